"""Full batches, their rounds, and comparisons of what was measured in one round."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairwise import each, pairs

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import Continuations, prefill
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.equal_memory import race as races
from blockwright.plugins.equal_memory.arm import Cell
from blockwright.plugins.equal_memory.charts import fastest, widest
from blockwright.plugins.equal_memory.race import FullBatch, Machine, Peaks, Seconds, Turns, allocated, race
from blockwright.plugins.equal_memory.request import Bits, Request, Settings
from blockwright.plugins.equal_memory.results import PAPER, Comparison, Results, Row, Spread, paper

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
    for least, most, verdict in ((1.05, 1.2, "better"), (0.9, 1.2, "undecided"), (0.5, 0.9, "worse")):
        speed = Spread(1.1, least, most)
        assert Comparison("bits", Cell("a", 6, 1), Cell("a", None, 1), 1, speed, 1, 0).verdict == verdict


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


# Rounds


CELLS = [Cell(arm, bits, 64) for bits in (None, 6) for arm in ("mha", "mla")]


class Recorded:
    """Stands for a full batch or a machine: notes its turns, and takes longer each time."""

    def __init__(self, name: Any, log: list[Any]) -> None:
        self.name, self.log, self.rows, self.row_bytes = name, log, 3, 10

    def turn(self) -> Any:
        self.log.append(self.name)
        if self.name == "machine":
            return Peaks(1.0, float(len(self.log)))
        return Seconds(float(len(self.log)), 0.0), 30


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setattr(races, "FullBatch", lambda decoder, cell, settings: Recorded(cell, log))
    decoders: Any = {"mha": None, "mla": None}
    machine: Any = Recorded("machine", log)
    done = race(decoders, CELLS, Settings("1kB", repeats=3), machine)
    there, back = ["machine", *CELLS], ["machine", *reversed(CELLS)]
    assert log == [*there, *back, *there]
    assert [each.read for each in done.peaks] == [1.0, 6.0, 11.0]
    assert [s.processor for s in done.turns[CELLS[0]].seconds] == [2.0, 10.0, 12.0]
    assert list(done.turns) == CELLS and done.turns[CELLS[3]].bytes == 30


KDA = {"name": "kda", "n_heads": 3, "head_dim": 8}
MLA = {"attention": {"name": "mla", "n_heads": 3}}
HYBRID = {**MLA, "variants": {"attention": {"linear": KDA}}, "layout": {"attention": "linear attention"}}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"attention": {"name": "mha", "n_heads": 3}},
    "gqa": {"attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 2}},
    "mla": MLA,
    "window": {"attention": {"name": "sliding_window", "n_heads": 3, "n_kv_heads": 3, "window": 7}},
    "kda": {"attention": KDA},
    "hybrid": HYBRID,
}
CONTEXT = 37


def build(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    plain = {"variants": None, "layout": None, "gating": None, "experts": None}
    sizes = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "ffn": {"name": "swiglu", "d_ff": 20}}
    return compose(preset("tiny", {**plain, **sizes, **MODELS[name]})).to(dtype).eval()


def batch(name: str, bits: Bits, memory: str = "100kB", rows: int | None = None, **more: Any) -> FullBatch:
    return FullBatch(build(name, **more), Cell(name, bits, CONTEXT), Settings(memory, rows=rows, steps=5))


@pytest.mark.parametrize(("name", "bits"), each(list(MODELS), [None, 8, 6, 4]))
def test_as_many_rows_as_fit_and_no_more(name: str, bits: Bits) -> None:
    full = batch(name, bits)
    seconds, held = full.turn()
    assert full.rows * full.row_bytes <= 100_000 < (full.rows + 1) * full.row_bytes
    assert held == full.rows * full.row_bytes
    assert seconds.processor > 0 and seconds.wall > 0


def test_rows_are_limited_by_what_is_chosen_too() -> None:
    assert batch("gqa", None, rows=3).rows == 3
    assert batch("gqa", None, rows=10_000).rows == batch("gqa", None).rows


def test_bytes_are_those_of_the_memory_behind_views() -> None:
    caches = build("gqa").new_caches(3, CONTEXT)
    assert allocated(caches) == sum(buffer.nbytes for cache in caches for buffer in cache.buffers.values()) > 0
    whole, other = torch.zeros(4, 5), torch.zeros(7)
    views: Any = SimpleNamespace(buffers={"first": whole[:1], "last": whole[3:], "other": other[2:3]})
    assert allocated([views, views]) == whole.nbytes + other.nbytes


@pytest.mark.parametrize(("name", "bits", "dtype"), pairs(list(MODELS), [None, 6], [torch.float32, torch.bfloat16]))
@torch.inference_mode()
def test_every_row_decodes_what_it_would_alone(name: str, bits: Bits, dtype: torch.dtype) -> None:
    off = 1e-5 if dtype == torch.float32 else 3e-2
    full = batch(name, bits, rows=3, dtype=dtype)
    prompt = FullBatch._tokens(_again(full), 1, CONTEXT - 6)
    tokens = torch.tensor([[5], [11], [60]])
    together = prefill(full.decoder, tokens, full.caches())
    for row, token in enumerate(tokens):
        alone = full.decoder.new_caches(1, CONTEXT, bits)
        prefill(full.decoder, prompt, alone)
        expected = prefill(full.decoder, token[None], alone)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=off, atol=off)


def _again(full: FullBatch) -> FullBatch:
    """The same batch, before it has drawn anything."""
    full.draws.manual_seed(0)
    return full


def test_steps_are_those_of_greedy_decoding() -> None:
    full = batch("hybrid", None, rows=1)
    prompt = _again(full)._tokens(1, CONTEXT - 6)[0].tolist()
    greedy = Continuations(full.decoder, [prompt], 6, Sampling(temperature=0))
    expected = [tokens[0] for tokens in greedy]
    with torch.inference_mode():
        caches, token = full.caches(), torch.tensor([[expected[0]]])
        for later in expected[1:]:
            token = full._step(token, caches)
            assert token.item() == later


def test_a_turn_fills_its_caches_and_leaves_the_prompt_as_it_was() -> None:
    full = batch("mla", None, rows=2)
    before = [{name: held.clone() for name, held in cache.buffers.items()} for cache in full._one]
    lengths: list[int] = []
    step = full._step
    full._step = lambda tokens, caches: (step(tokens, caches), lengths.append(caches[0].length))[0]  # type: ignore[method-assign]
    full.turn()
    full.turn()
    assert lengths == [*range(CONTEXT - 5, CONTEXT + 1)] * 2
    for cache, old in zip(full._one, before, strict=True):
        for name, held in cache.buffers.items():
            assert torch.equal(held, old[name])


def test_seconds_are_those_of_one_step() -> None:
    full = batch("gqa", None, rows=1)

    def busy(tokens: torch.Tensor, caches: object) -> torch.Tensor:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass
        return tokens

    full._step = busy  # type: ignore[method-assign]
    assert full.turn()[0].processor == pytest.approx(0.01, rel=0.5)
