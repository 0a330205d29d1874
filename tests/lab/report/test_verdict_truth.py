"""Verdicts on equal arms, from the files of a sweep to the sentence: how often they are wrong."""

import math
import random
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pairwise
import pytest
from sweep_folder import planned

from benchmarks import same_arms
from blockwright.lab.report import evidence
from blockwright.lab.report import verdict as giving
from blockwright.lab.report.evidence import Side, weigh
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.sweep import Arm, Bank, Design, Run, Sweep
from blockwright.lab.report.verdict import verdicts
from blockwright.lab.statistics import intervals, looks, tuning
from blockwright.lab.statistics.tuning import COMPARE, RATE, TUNE, Try, octaves
from blockwright.training.result import Result

pytestmark = pytest.mark.xdist_group("verdict_truth")  # its sweeps are slow to write

SWEEPS, MANY = 200, 300
ARMS = ("mha", "gqa", "mqa", "mla")


def losses_of(rng, seeds):
    """Four arms that do not differ, under a data order that moves all arms of a seed."""
    order = [rng.gauss(0, 0.02) for _ in range(seeds)]
    return {arm: [2 + of_seed + rng.gauss(0, 0.005) for of_seed in order] for arm in ARMS}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Written to files, and read."""
    folder, rng = tmp_path_factory.mktemp("equal"), random.Random(0)
    keys = {"looks": [2, 3, 4], "spend": "pocock"}
    return [read(planned(folder / f"sweep{i}", losses_of(rng, 4), **keys)) for i in range(SWEEPS)]


def share_wrong(sweeps):
    """Share of the sweeps in which an arm is called better or worse."""
    kinds = [{each.kind for each in verdicts(find(sweep))} for sweep in sweeps]
    assert not any("none" in each for each in kinds)
    return sum(not each.isdisjoint({"better", "worse"}) for each in kinds) / len(kinds)


def share_different(sweeps):
    """The same without the sentences, in less time."""

    def differs(findings):
        return any(arm.evidence.is_different for arm in findings.others if arm.evidence)

    return sum(differs(find(sweep)) for sweep in sweeps) / len(sweeps)


@pytest.mark.slow
def test_equal_arms_are_seldom_called_different(sweeps, monkeypatch):
    """At each look and once at all; without a correction, or a level that looks share, they would be."""
    assert share_wrong(sweeps) == share_different(sweeps) <= 0.07
    fixed = [replace(sweep, design=Design()) for sweep in sweeps]
    corrected = share_different(fixed)
    assert corrected <= 0.07
    with monkeypatch.context() as patch:
        patch.setattr(intervals, "holm", list)
        assert share_different(fixed) > 1.5 * corrected
    monkeypatch.setattr(looks, "nominal", lambda seeds, spend, level=0.05: (level,) * len(seeds))
    evidence.planned.cache_clear()
    try:
        assert share_different(sweeps) > 0.07
    finally:
        evidence.planned.cache_clear()


def in_memory(sweep, seeds, design):
    """Many more of that kind, without files."""
    rng, made = random.Random(1), []
    for _ in range(MANY):
        arms = []
        for arm, losses in zip(sweep.arms, losses_of(rng, seeds).values(), strict=True):
            like = arm.runs[0]
            results = [replace(like.result, metrics={"val/loss": loss}) for loss in losses]
            runs = [replace(like, seed=seed, result=each) for seed, each in enumerate(results)]
            arms.append(replace(arm, runs=tuple(runs)))
        made.append(replace(sweep, arms=tuple(arms), design=design))
    return made


@pytest.mark.slow
def test_size_of_growing_sweeps_with_a_bank(sweeps):
    bank = Bank(0.005 * 2**0.5, 12)
    design = Design(looks=(3, 6, 9, 12), spend="obrien_fleming", bank=bank, within=0.01)
    assert share_different(in_memory(sweeps[0], 12, design)) <= 0.09  # .05 and three standard errors


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seeds"), pairwise.each([*same_arms.DRAWS], same_arms.SEEDS))
def test_equal_arms_are_rarely_called_different(how, seeds):
    # .05 and three standard errors; ``python -m benchmarks.same_arms`` draws 200 of each.
    assert same_arms.wrong(same_arms.bank(), how, seeds, number=60).value <= 0.135


NOISE, ORDER, CURVATURE = 0.01, 0.02, 0.02  # nats of a run's own, of the order of the data; nats per octave²


# Arms without a difference: the noise of each, the baseline's first, in units of NOISE; seeds; looks; whether each has
# tries and is compared at their vertex; whether the last computes the same as the one before it.
Null = namedtuple("Null", "noise seeds looks tuned twice", defaults=((), False, False))
DESIGNS = [
    Null((4, 1, 1), 3),
    Null((3, 1, 1, 1), 16, looks=(4, 8, 12, 16)),
    Null((2, 1, 1, 1), 8, tuned=True),
    Null((1,) * 5, 4, twice=True),
]


def draws(null, number):
    """Draws of a design."""
    rng = np.random.default_rng(DESIGNS.index(null))
    for _ in range(number):
        order = rng.normal(0, ORDER, null.seeds)
        made = []
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


def excess(value, best):
    return CURVATURE * (math.log2(value) - best) ** 2


def run(loss, seed, stage, tries):
    return Run(seed, None, (), seed, None, Result("completed", metrics={"val/loss": loss}), {}, stage, tries)


@pytest.mark.slow
@pytest.mark.parametrize("null", DESIGNS, ids=str)
def test_equal_arms_are_rarely_called_different_and_intervals_hold_the_truth(null, monkeypatch):
    monkeypatch.setattr(giving, "need", lambda case: None)  # what takes most of the time, and is no verdict
    wrong, missed = [], []
    for sweep in draws(null, 150):
        every = verdicts(find(sweep))
        if any(each.kind == "none" for each in every):  # a best try at an edge
            continue
        wrong.append(any(each.kind in ("better", "worse") for each in every))
        missed += [not each.interval[0] <= 0 <= each.interval[1] for each in every]
    assert np.mean(wrong) <= 0.06 + 0.058  # three errors of the simulation: 3 √(0.06 · 0.94 / 150)
    assert np.mean(missed) <= 0.06 + 0.033  # of three times as many intervals, which share a baseline


def test_a_noisy_baseline_is_in_every_interval():
    rng, missed, number = np.random.default_rng(0), 0, 300
    for _ in range(number):
        losses = rng.standard_normal((3, 3)) * np.array([[4], [1], [1]])
        sides = [
            Side(str(i), "0" if i else "", (0, 1, 2), dict(enumerate(row.tolist())), frozenset(), {})
            for i, row in enumerate(losses)
        ]
        found = weigh(sides, Design())
        for each in found.values():
            low, high = each.comparison.difference.low, each.comparison.difference.high
            missed += low is None or high is None or not low <= 0 <= high
    assert missed / (2 * number) <= 0.08
