"""The page of best rates says what its own tries say by the code of today."""

from __future__ import annotations

import math
import re

import pytest

from benchmarks.record import RESULTS
from blockwright.lab.statistics.tuning import Try, fit

PAGE = (RESULTS / "widths.md").read_text()
MODELS = ("64", "256, rules", "256, standard")


def best(optimizer: str, model: str) -> float:
    """The vertex of the tries that the page lists."""
    (row,) = re.findall(rf"^\| {optimizer}, {model} \|(.*)\|$", PAGE, re.M)
    return fit([Try(*map(float, each.split(":"))) for each in row.split("|")]).vertex


@pytest.mark.parametrize("optimizer", ["Muon", "AdamW"])
def test_best_rates_are_those_of_the_tries(optimizer: str) -> None:
    (row,) = re.findall(rf"^\| {optimizer} \|(.*)\|$", PAGE, re.M)
    base, rules, moved, standard, moved_without = (
        float(cell.strip().strip("*").replace("−", "-")) for cell in row.split("|")
    )
    found = [best(optimizer, model) for model in MODELS]
    assert [base, rules, standard] == pytest.approx(found, rel=0.02)
    assert [moved, moved_without] == pytest.approx([math.log2(each / found[0]) for each in found[1:]], abs=0.015)
    assert abs(moved) < 0.5 < 1.5 < -moved_without
