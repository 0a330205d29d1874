"""Bands of tuning curves, on 24 draws of a published random search whose 1,024 values give the true curve."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from blockwright.lab.statistics.tuning_bands import bands

DEBERTA = json.loads((Path(__file__).parent / "deberta_mnli.json").read_text())
opda = pytest.importorskip("opda", reason="extra lab")


def errors(model: str) -> list[float]:
    return [1 - accuracy for accuracy in DEBERTA[model]["accuracies"]]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deberta", "deberta_v3"])
def test_bands_hold_the_true_curve(model: str) -> None:
    curve, truth = bands(errors(model)), [1 - best for best in DEBERTA[model]["median_of_best"]]
    assert curve is not None and len(curve.point) == 24
    for low, point, high, true in zip(curve.low, curve.point, curve.high, truth, strict=True):
        assert low <= true <= high and low <= point <= high
    assert list(curve.high) == sorted(curve.high, reverse=True)  # more tries are never worse


@pytest.mark.slow
def test_bands_are_opdas() -> None:
    import numpy as np
    from opda.nonparametric import EmpiricalDistribution

    curve, values = bands(errors("deberta")), errors("deberta")
    assert curve is not None
    with pytest.warns(RuntimeWarning, match="Duplicates"):
        below, middle, above = EmpiricalDistribution.confidence_bands(
            values, 0.95, a=0.0, generator=np.random.default_rng(0), method="ld_equal_tailed"
        )
    for ours, theirs in ((curve.high, below), (curve.point, middle), (curve.low, above)):
        assert ours == pytest.approx(theirs.quantile_tuning_curve(range(1, 25), minimize=True), rel=1e-9)


def test_diverged_tries_are_the_worst() -> None:
    curve = bands([2.0, math.nan, 2.1, math.inf, 2.05])
    assert curve is not None and curve.point[-1] == 2.0 and curve.high[0] == math.inf
    assert bands([2.0]) is None


def test_without_opda_there_are_no_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opda", None)
    assert bands([2.0, 2.1, 2.2]) is None
