"""Comparisons: each change apart, and ratios of turns of the same round."""

from __future__ import annotations

import time

import pytest
import torch

from blockwright.plugins.equal_memory.arm import Cell
from blockwright.plugins.equal_memory.clock import Seconds
from blockwright.plugins.equal_memory.forecast import PAPER, paper
from blockwright.plugins.equal_memory.machine import Machine, Peaks
from blockwright.plugins.equal_memory.race import Turns
from blockwright.plugins.equal_memory.request import Bits, Request, Settings
from blockwright.plugins.equal_memory.results import Comparison, Results, Row, Spread
from blockwright.plugins.equal_memory.tables import fastest, widest

CPU = torch.device("cpu")
LOAD = (1.0, 2.0, 1.5)  # how much slower each round is for all


def row(arm: str, bits: Bits, context: int, rows: int, seconds: float, bytes_of_one: int) -> Row:
    took = tuple(Seconds(seconds * load, 100.0) for load in LOAD)
    turns = Turns(bytes_of_one, rows, rows * bytes_of_one, took)
    return Row(Cell(arm, bits, context), 1, turns, Spread.of(turns.rates(CPU)), rows, 2 * rows / seconds, 1.0)


def results(baseline: str = "mha") -> Results:
    settings = Settings("1MB", (None, 6), (64, 128))
    request = Request({"mha": [], "mla": [], "gqa": []}, baseline, settings, [], "", False)
    made = []
    for context in (64, 128):
        made += [row("mha", None, context, 4, 1.0, 800), row("mla", None, context, 8, 1.0, 400)]
        made += [row("gqa", None, context, 6, 1.0, 600), row("mha", 6, context, 12, 6.0, 200)]
        made += [row("mla", 6, context, 32, 2.0, 100), row("gqa", 6, context, 18, 6.0, 150)]
    return Results(request, CPU, tuple(made), {64: Peaks(1.0, 1.0), 128: Peaks(1.0, 1.0)}, (PAPER,))


def one(found: list[Comparison], arm: str, bits: Bits, context: int = 64) -> Comparison:
    (each,) = [each for each in found if each.cell == Cell(arm, bits, context)]
    return each


def test_each_comparison_changes_one_thing_or_both() -> None:
    found = results()
    architecture, bits, both = (found.comparisons(change) for change in ("architecture", "bits", "both"))
    assert {(c.cell.bits, c.against.bits, c.against.arm) for c in architecture} == {(None, None, "mha"), (6, 6, "mha")}
    assert {c.cell.arm for c in architecture} == {"mla", "gqa"}
    assert all(c.cell.arm == c.against.arm and (c.cell.bits, c.against.bits) == (6, None) for c in bits)
    assert {c.cell.arm for c in bits} == {"mha", "mla", "gqa"}
    assert {c.against for c in both} == {Cell("mha", None, 64), Cell("mha", None, 128)}
    assert {c.cell.arm for c in both} == {"mla", "gqa"} and {c.cell.bits for c in both} == {6}


def test_ratios_are_of_the_same_round() -> None:
    architecture = one(results().comparisons("architecture"), "mla", None)
    assert architecture.speed == Spread(2.0, 2.0, 2.0)  # all rounds are equally slow for both
    assert (architecture.rows, architecture.saved, architecture.planned) == (2.0, 0.5, 2.0)
    bits = one(results().comparisons("bits"), "mha", 6)
    assert bits.speed.median == pytest.approx(0.5) and bits.rows == 3 and bits.saved == 0.75


def test_both_is_the_product_of_architecture_and_bits() -> None:
    found = results()
    architecture, bits = one(found.comparisons("architecture"), "mla", 6), one(found.comparisons("bits"), "mha", 6)
    both = one(found.comparisons("both"), "mla", 6)
    assert both.speed.median == pytest.approx(architecture.speed.median * bits.speed.median) == 4.0


def test_an_arm_is_faster_only_if_every_round_says_so() -> None:
    verdicts = {
        (least, most): Comparison(
            "bits", Cell("a", 6, 1), Cell("a", None, 1), 1, Spread(1.1, least, most), 1, 0
        ).verdict
        for least, most in ((1.05, 1.2), (0.9, 1.2), (0.5, 0.9))
    }
    assert list(verdicts.values()) == ["better", "undecided", "worse"]


def test_another_baseline_turns_the_comparison_around() -> None:
    there = one(results("mla").comparisons("architecture"), "mha", None)
    assert there.speed.median == 0.5 and there.verdict == "worse"


def test_the_paper_is_shown_next_to_the_widest_change_at_the_longest_context() -> None:
    assert {(each.change, each.cell.context) for each in widest(results())} == {("both", 128)}
    assert fastest(results(), "both").cell == Cell("mla", 6, 128)  # type: ignore[union-attr]


def test_the_clock_of_a_cpu_is_its_processor_and_of_a_gpu_the_wall() -> None:
    took = Seconds(processor=2.0, wall=3.0) / 2
    assert took.on(CPU) == 1.0 and took.on(torch.device("cuda")) == 1.5


def test_planner_and_roofline_errors_are_relative_to_what_was_measured() -> None:
    each = row("mha", None, 64, 4, 1.0, 800)
    assert each.speed == Spread(4 / 1.5, 2.0, 4.0) and each.rows_off == 0
    assert each.off == pytest.approx(8 / (4 / 1.5) - 1)


def test_machine_counts_the_processor_time_of_its_work() -> None:
    machine = Machine(CPU, torch.float32, 1000)

    def busy() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    rate = machine._rate(busy, 10**9)
    assert 0.5 < rate * 0.02 / 1e9 <= 1.0
    assert machine.numbers.nbytes == 1000 and Machine(CPU, torch.float32, 2**40).numbers.nbytes == 2**28


@pytest.mark.slow
def test_the_plan_of_the_papers_node_is_near_its_claim() -> None:
    claim, both, architecture, bits = paper()
    assert (claim.speed, claim.saved) == (5.76, 0.933)
    assert both.speed == pytest.approx(claim.speed, rel=0.1) and both.saved == pytest.approx(claim.saved, abs=0.005)
    assert both.speed == pytest.approx(architecture.speed * bits.speed)
    assert architecture.saved is not None and architecture.saved == pytest.approx(0.8224, abs=1e-4)
