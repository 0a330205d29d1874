"""Equal arms under many designs, through the code that gives verdicts: false ones are rare, intervals hold the truth.

A design that is added to the table is drawn and checked as the others are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from blockwright.lab.report import verdict as giving
from blockwright.lab.report.evidence import Side, weigh
from blockwright.lab.report.findings import find
from blockwright.lab.report.sweep import Arm, Design, Run, Sweep
from blockwright.lab.report.verdict import verdicts
from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.tuning import Try
from blockwright.lab.sweep.tuning import COMPARE, RATE, TUNE, octaves
from blockwright.training.result import Result

NOISE, ORDER, CURVATURE = 0.01, 0.02, 0.02  # nats of a run's own, of the order of the data; nats per octave²


@dataclass(frozen=True)
class Null:
    """Arms without a difference.

    Args:
        noise: of each arm, the baseline first, in units of ``NOISE``
        seeds: that are compared
        looks: numbers of seeds; none: once, at all
        tuned: whether each arm has tries of its rate, and is compared at their vertex
        twice: whether the last arm computes the same as the one before it, bit for bit
    """

    noise: tuple[float, ...]
    seeds: int
    looks: tuple[int, ...] = ()
    tuned: bool = False
    twice: bool = False

    def __str__(self) -> str:
        shown = ":".join(f"{each:g}" for each in self.noise)
        further = [f"looks {'-'.join(map(str, self.looks))}" * bool(self.looks), "tuned" * self.tuned]
        return ", ".join(filter(None, (f"{shown} × {self.seeds}", *further, "one twice" * self.twice)))


EQUAL = [Null((1,) * arms, seeds) for arms, seeds in ((2, 4), (3, 3), (4, 2), (4, 3), (4, 8), (6, 3))]
UNEQUAL = [
    Null((2, 1, 1, 1), 8),
    Null((4, 1, 1, 1), 8),
    Null((1, 1, 1, 3), 8),
    Null((4, 1, 1), 3),
    Null((2, 1, 1, 1), 3),
    Null((1, 1, 3), 8),
    Null((1, 1, 1, 10), 8),
    Null((0.25, 1, 1, 1), 8),
]
FURTHER = [
    Null((1,) * 4, 16, looks=(4, 8, 12, 16)),
    Null((3, 1, 1, 1), 16, looks=(4, 8, 12, 16)),
    Null((1,) * 4, 8, tuned=True),
    Null((2, 1, 1, 1), 8, tuned=True),
    Null((1,) * 5, 4, twice=True),
]
DESIGNS = [*EQUAL, *UNEQUAL, *FURTHER]


def sweeps(null: Null, number: int) -> Iterator[Sweep]:
    """Draws of a design."""
    rng = np.random.default_rng(list(map(ord, str(null))))
    for _ in range(number):
        order = rng.normal(0, ORDER, null.seeds)
        made: list[Arm] = []
        for i, noise in enumerate(null.noise):
            best, tries, at = rng.uniform(-0.5, 0.5), [], 1.0
            if null.tuned:
                tries = [Try(x, excess(x, best) + noise * NOISE * rng.standard_normal()) for x in octaves(1.0, 5)]
                at = tuning.fit(tries).vertex
            losses = 2 + order + excess(at, best) * null.tuned + noise * NOISE * rng.standard_normal(null.seeds)
            if null.twice and i == len(null.noise) - 1:
                made.append(Arm("twin", (), made[-1].runs, against="0"))
                continue
            runs = [run(each.loss, 9, TUNE, {RATE: each.value}) for each in tries]
            runs += [run(float(x), seed, COMPARE, {RATE: at} if tries else {}) for seed, x in enumerate(losses)]
            made.append(Arm(str(i), (), tuple(runs), against="0" if i else None))
        yield Sweep(Path("x"), "ablation", "x", "", "val/loss", False, tuple(made), 0, design=Design(looks=null.looks))


def excess(value: float, best: float) -> float:
    return CURVATURE * (math.log2(value) - best) ** 2


def run(loss: float, seed: int, stage: str, tries: dict[str, float]) -> Run:
    return Run(seed, None, (), seed, None, Result("completed", metrics={"val/loss": loss}), {}, stage, tries)


@dataclass(frozen=True)
class Counted:
    """What was seen of many draws: of those with verdicts, the false ones; of intervals, those without the truth."""

    sweeps: int
    wrong: int
    intervals: int
    missed: Counter[str]

    @property
    def false(self) -> float:
        return self.wrong / self.sweeps

    @property
    def coverage(self) -> float:
        return 1 - self.missed.total() / self.intervals


def counted(null: Null, number: int) -> Counted:
    judged = wrong = intervals = 0
    missed: Counter[str] = Counter()
    for sweep in sweeps(null, number):
        every = verdicts(find(sweep))
        if any(each.kind == "none" for each in every):  # a best try at an edge
            continue
        judged += 1
        wrong += any(each.kind in ("better", "worse") for each in every)
        for each in every:
            assert each.interval is not None
            intervals += 1
            missed[each.arm] += not each.interval[0] <= 0 <= each.interval[1]
    return Counted(judged, wrong, intervals, missed)


@pytest.fixture(autouse=True)
def _without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds that an undecided arm needs are most of the time, and no verdict."""
    monkeypatch.setattr(giving, "need", lambda case: None)


@pytest.mark.slow
@pytest.mark.parametrize("null", DESIGNS[::6], ids=str)
def test_equal_arms_are_rarely_called_different_and_intervals_hold_the_truth(null: Null) -> None:
    """A part of the designs; ``DESIGNS`` with 1,500 sweeps each takes an hour."""
    found = counted(null, 150)
    assert found.false <= 0.06 + 0.058  # three errors of the simulation: 3 √(0.06 · 0.94 / 150)
    assert found.coverage >= 0.94 - 0.033  # of three times as many intervals, which share a baseline


def test_a_noisy_baseline_is_in_every_interval() -> None:
    """With one variance for all arms, 11 % of these miss the truth."""
    rng, missed, number = np.random.default_rng(0), 0, 300
    for _ in range(number):
        losses = rng.standard_normal((3, 3)) * np.array([[4], [1], [1]])
        sides = [
            Side(str(i), "0" if i else "", (0, 1, 2), dict(enumerate(row.tolist())), frozenset(), {})
            for i, row in enumerate(losses)
        ]
        found = weigh(sides, Design())
        for each in found.values():
            assert each.comparison is not None
            low, high = each.comparison.difference.low, each.comparison.difference.high
            missed += low is None or high is None or not low <= 0 <= high
    assert missed / (2 * number) <= 0.08
