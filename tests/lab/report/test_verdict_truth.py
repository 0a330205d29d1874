"""Verdicts on equal arms, from the files of a sweep to the sentence: how often they are wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from sweep_folder import planned

from blockwright.lab.report import evidence
from blockwright.lab.report.findings import Findings, find
from blockwright.lab.report.reading import read
from blockwright.lab.report.sweep import Bank, Design, Sweep
from blockwright.lab.report.verdict import verdicts
from blockwright.lab.statistics import intervals, looks
from blockwright.lab.statistics.looks import Spend

pytestmark = pytest.mark.xdist_group("verdict_truth")  # its sweeps are slow to write

SWEEPS, MANY = 200, 300
ARMS = ("mha", "gqa", "mqa", "mla")


def losses_of(rng: random.Random, seeds: int) -> dict[str, list[float]]:
    """Four arms that do not differ, under a data order that moves all arms of a seed."""
    order = [rng.gauss(0, 0.02) for _ in range(seeds)]
    return {arm: [2 + of_seed + rng.gauss(0, 0.005) for of_seed in order] for arm in ARMS}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[Sweep]:
    """Written to files, and read."""
    folder, rng = tmp_path_factory.mktemp("equal"), random.Random(0)
    keys = {"looks": [2, 3, 4], "spend": "pocock"}
    return [read(planned(folder / f"sweep{i}", losses_of(rng, 4), **keys)) for i in range(SWEEPS)]


def share_wrong(sweeps: list[Sweep]) -> float:
    """Share of the sweeps in which an arm is called better or worse."""
    kinds = [{each.kind for each in verdicts(find(sweep))} for sweep in sweeps]
    assert not any("none" in each for each in kinds)
    return sum(not each.isdisjoint({"better", "worse"}) for each in kinds) / len(kinds)


def share_different(sweeps: list[Sweep]) -> float:
    """The same without the sentences, in less time."""

    def differs(findings: Findings) -> bool:
        return any(arm.evidence.is_different for arm in findings.others if arm.evidence)

    return sum(differs(find(sweep)) for sweep in sweeps) / len(sweeps)


def fixed(sweeps: list[Sweep]) -> list[Sweep]:
    """The same runs, planned to be looked at once."""
    return [replace(sweep, design=Design()) for sweep in sweeps]


@pytest.mark.slow
def test_equal_arms_of_a_growing_sweep_are_seldom_called_different(sweeps: list[Sweep]) -> None:
    assert share_wrong(sweeps) == share_different(sweeps) <= 0.07


@pytest.mark.slow
def test_equal_arms_of_a_fixed_sweep_are_seldom_called_different(sweeps: list[Sweep]) -> None:
    assert share_different(fixed(sweeps)) <= 0.07


@pytest.mark.slow
def test_without_a_correction_they_would_be(sweeps: list[Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    corrected = share_different(fixed(sweeps))
    monkeypatch.setattr(intervals, "holm", list)
    assert share_different(fixed(sweeps)) > 1.5 * corrected


@pytest.mark.slow
def test_looks_without_spending_would_call_them_different(sweeps: list[Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "nominal", lambda seeds, spend, level=0.05: (level,) * len(seeds))
    evidence.planned.cache_clear()
    try:
        assert share_different(sweeps) > 0.07
    finally:
        evidence.planned.cache_clear()


def in_memory(sweep: Sweep, seeds: int, design: Design) -> list[Sweep]:
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
@pytest.mark.parametrize(("spend", "bank"), [("pocock", None), ("obrien_fleming", Bank(0.005 * 2**0.5, 12))])
def test_size_of_growing_sweeps(spend: Spend, bank: Bank | None, sweeps: list[Sweep]) -> None:
    design = Design(looks=(3, 6, 9, 12), spend=spend, bank=bank, within=0.01)
    assert share_different(in_memory(sweeps[0], 12, design)) <= 0.09  # .05 and three standard errors


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 8])
def test_size_of_fixed_sweeps(seeds: int, sweeps: list[Sweep]) -> None:
    assert 0.01 <= share_different(in_memory(sweeps[0], seeds, Design())) <= 0.09
