"""Verdicts on equal arms, from the files of a sweep to the sentence: how often they are wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import planned

from blockwright.lab.report import evidence
from blockwright.lab.report.findings import Findings, find
from blockwright.lab.report.reading import read
from blockwright.lab.report.sweep import Design, Sweep
from blockwright.lab.report.verdict import verdicts
from blockwright.lab.statistics import intervals, looks

pytestmark = pytest.mark.xdist_group("verdict_truth")  # its sweeps are slow to write

SWEEPS = 200
ARMS = ("mha", "gqa", "mqa", "mla")


def equal(folder: Path, seeds: int, sweeps: int, first: int = 0, **keys: Any) -> list[Sweep]:
    """Sweeps of four arms that do not differ, written and read."""
    made = []
    for i in range(sweeps):
        rng = random.Random(first + i)
        order = [rng.gauss(0, 0.02) for _ in range(seeds)]
        losses = {arm: [2 + of_seed + rng.gauss(0, 0.005) for of_seed in order] for arm in ARMS}
        made.append(read(planned(folder / f"sweep{i}", losses, **keys)))
    return made


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[Sweep]:
    return equal(tmp_path_factory.mktemp("equal"), 4, SWEEPS, looks=[2, 3, 4], spend="pocock")


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


def test_equal_arms_of_a_growing_sweep_are_seldom_called_different(sweeps: list[Sweep]) -> None:
    assert share_wrong(sweeps) == share_different(sweeps) <= 0.07


def test_equal_arms_of_a_fixed_sweep_are_seldom_called_different(sweeps: list[Sweep]) -> None:
    assert share_different(fixed(sweeps)) <= 0.07


def test_without_a_correction_they_would_be(sweeps: list[Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "holm", list)
    assert share_different(fixed(sweeps)) > 0.07


def test_looks_without_spending_would_call_them_different(sweeps: list[Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "nominal", lambda seeds, spend, level=0.05: (level,) * len(seeds))
    evidence.planned.cache_clear()
    try:
        assert share_different(sweeps) > 0.07
    finally:
        evidence.planned.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("spend", ["pocock", "obrien_fleming"])
@pytest.mark.parametrize("bank", [None, {"sd": 0.005 * 2**0.5, "dof": 12}], ids=["alone", "bank"])
def test_size_of_growing_sweeps(spend: str, bank: dict[str, float] | None, tmp_path: Path) -> None:
    keys = {"looks": [3, 6, 9, 12], "spend": spend, "bank": bank, "within": 0.01}
    assert 0.02 <= share_different(equal(tmp_path, 12, 1500, first=10_000, **keys)) <= 0.065


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_size_of_fixed_sweeps(seeds: int, tmp_path: Path) -> None:
    assert 0.02 <= share_different(equal(tmp_path, seeds, 1500, first=10_000)) <= 0.065
