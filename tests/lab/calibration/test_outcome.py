"""What is seen of a control, and when an instrument passes: on losses whose truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from blockwright.lab.calibration import control as controls
from blockwright.lab.calibration.control import Control, Expect
from blockwright.lab.calibration.outcome import Outcome, Summary, judge
from blockwright.lab.report import evidence
from blockwright.lab.report.sweep import Run
from blockwright.lab.statistics import intervals, looks, tuning, variance

Loss = Callable[[str, Run], float]


def judged(control: Control, loss: Loss) -> Outcome:
    """Of runs that are not trained.

    Args:
        control: the comparison
        loss: of an arm, by its name, and one of its runs
    """
    losses: dict[tuple[str, ...], float] = {}
    while control.missing(losses):
        for sweep in control.sweeps(losses):
            losses |= {run.overrides: loss(arm.name, run) for arm in sweep.arms for run in arm.runs if run.is_pending}
    found = judge(control, losses)
    assert found is not None
    return found


def outcome(expect: Expect, differences: Sequence[float], least: float = 0.0, **keys: Any) -> Outcome:
    """Of runs that differ by so much, seed by seed."""
    control = Control("x", "about", expect, {"b": ("b=2",)}, least=least, seeds=tuple(range(len(differences))), **keys)
    return judged(control, lambda arm, run: 2.0 + differences[run.seed] * (arm == "b"))


@pytest.mark.parametrize(
    ("expect", "differences", "least", "seen", "known"),
    [
        ("worse", [0.30, 0.31, 0.29], 0.2, "worse", True),
        ("worse", [0.30, 0.31, 0.29], 0.4, "worse", False),  # there, but nearly gone
        ("better", [0.30, 0.31, 0.29], 0.2, "worse", False),  # the other way
        ("better", [-0.30, -0.31, -0.29], 0.2, "better", True),
        ("worse", [0.9, -0.2, 0.1], 0.2, "undecided", False),
        ("worse", [0.0, 0.0, 0.0], 0.2, "identical", False),
        ("better", [-0.3, -0.3, math.inf], 0.2, "none", False),
        ("absent", [0.01, -0.02, 0.005], 0.0, "undecided", True),
        ("absent", [0.10, 0.11, 0.09], 0.0, "worse", False),
        ("absent", [0.0, 0.0, 0.0], 0.0, "identical", True),
        ("absent", [math.inf, math.nan, math.inf], 0.0, "none", False),
        ("identical", [0.0, 0.0], 0.0, "identical", True),
        ("identical", [0.0, 1e-7], 0.0, "undecided", False),
    ],
)
def test_what_is_seen(expect: Expect, differences: list[float], least: float, seen: str, known: bool) -> None:
    found = outcome(expect, differences, least)
    assert (found.seen, not found.wrong) == (seen, known)


def test_a_control_with_a_run_missing_has_no_outcome() -> None:
    control = Control("x", "about", "worse", {"b": ("b=2",)}, seeds=(0, 1))
    runs = control.missing({})
    assert len(runs) == 4 and judge(control, dict.fromkeys(runs[:-1], 2.0)) is None


def test_every_arm_and_every_repeat_has_to_be_as_known() -> None:
    arms: dict[str, tuple[str, ...]] = {"b": ("b=2",), "c": ("c=2",)}
    both = Control("x", "about", "worse", arms, seeds=(0, 1, 2))
    assert judged(both, lambda arm, run: 2 + 0.1 * (arm == "b") + 0.01 * run.seed * (arm == "c")).wrong == 1
    again = Control("x", "about", "absent", {"b": ()}, seeds=(0, 1, 2), apart=True, repeats=3)

    def third(arm: str, run: Run) -> float:  # is another
        seed = int(run.overrides[-1].removeprefix("seed="))
        return 2 + 0.001 * run.seed * (arm == "b") + (arm == "b") * (seed >= 200_000)

    found = judged(again, third)
    assert (found.repeats, found.wrong, found.seen) == (3, 1, "worse")


def test_an_arm_that_is_tuned_is_compared_at_its_own_best_rate() -> None:
    rates, best = (0.0125, 0.025, 0.05, 0.1, 0.2), {"baseline": 0.03, "b": 0.08}
    control = Control("x", "about", "absent", {"b": ("b=2",)}, seeds=(0, 1, 2), rates=rates)
    used: dict[str, set[float]] = {"baseline": set(), "b": set()}

    def loss(arm: str, run: Run) -> float:
        assert run.lr is not None
        if run.stage == "compare":
            used[arm].add(run.lr)
        return 2 + 0.1 * math.log2(run.lr / best[arm]) ** 2 + 0.001 * run.seed * (arm == "b")

    assert not judged(control, loss).wrong
    assert {arm: pytest.approx(rate, rel=0.02) for arm, rate in best.items()} == {a: u.pop() for a, u in used.items()}


def test_every_part_of_a_verdict_is_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none can break while an instrument still passes."""
    parts: list[tuple[Any, str]] = [
        (evidence, "weigh"), (variance, "between"), (intervals, "holm"), (looks, "nominal"), (tuning, "fit"),
    ]  # fmt: skip
    called: set[str] = set()
    for module, name in parts:
        function = getattr(module, name)

        def heard(*args: Any, _name: str = name, _function: Any = function, **keys: Any) -> Any:
            called.add(_name)
            return _function(*args, **keys)

        monkeypatch.setattr(module, name, heard)
    monkeypatch.setattr("blockwright.lab.report.findings.weigh", evidence.weigh)
    evidence.planned.cache_clear()
    for name in controls.FILES.names():
        judged(controls.read(name), lambda arm, run: 2 + 0.01 * random.Random(str(run.overrides)).gauss(0, 1))
    assert called == {name for _, name in parts}


def summary(found: int, false: int, identical: bool = True, effects: int = 8, absent: int = 4) -> Summary:
    there, gone = [0.3, 0.31, 0.29], [0.01, -0.02, 0.005]
    outcomes = [outcome("worse", there if i < found else gone) for i in range(effects)]
    outcomes += [outcome("absent", there if i < false else gone) for i in range(absent)]
    return Summary([*outcomes, outcome("identical", [0.0, 0.0] if identical else [1e-6, 0.0])])


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        (summary(8, 0), True),
        (summary(8, 1), True),  # one in twenty is chance
        (summary(8, 2), False),
        (summary(8, 2, absent=14), True),
        (summary(8, 3, absent=14), False),
        (summary(7, 0), False),
        (summary(8, 0, identical=False), False),  # never chance
        (Summary([]), False),
    ],
)
def test_when_an_instrument_passes(given: Summary, passes: bool) -> None:
    assert given.passes is passes
    assert given.counts in given.sentence and given.sentence.startswith("Calibrated") is passes


def test_the_sentence_says_what_was_covered_and_the_smallest_effect() -> None:
    tuned = outcome("absent", [0.01, -0.02, 0.005], looks=(2, 3))
    sentence = Summary([outcome("worse", [0.0301, 0.0302, 0.0303]), tuned]).sentence
    assert "0.03 nats" in sentence and "looks" in sentence and "tuning" not in sentence


@pytest.mark.slow
def test_absent_effects_are_seen_one_time_in_twenty_and_a_halved_rate_is_seen() -> None:
    """A/A pairs with the noise of the small text runs, sd 0.010; and a difference of 0.05, that of a halved rate."""
    noise = random.Random(0)

    def rate(effect: float, draws: int) -> float:
        seen = [outcome("absent", [effect + noise.gauss(0, 0.010) for _ in range(4)]) for _ in range(draws)]
        return sum(each.wrong for each in seen) / draws

    assert rate(0.0, 150) <= 0.1  # the size itself: tests/lab/report/test_verdict_truth.py
    assert rate(0.05, 20) > 0.9
