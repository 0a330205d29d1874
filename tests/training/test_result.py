"""results.json: what is written comes back, and a damaged or untrusted file does no harm."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from blockwright.training.figure import Figure
from blockwright.training.result import RESULTS, Result, record_failure

LOSS = Figure("loss", "nats per token", "less", ("val",))


def test_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result("completed", 10, 8, 3, 0.5, 1.5, 2.5, {"val/loss": math.inf}, {"val/loss": LOSS})
    result.write(tmp_path / "run")
    assert Result.read(tmp_path / "run") == result


def test_file_holds_known_values_in_a_fixed_order(tmp_path: Path) -> None:
    Result("completed", parameters=10, steps=0, metrics={"val/loss": 1.0}, figures={"val/loss": LOSS}).write(tmp_path)
    plain = json.loads((tmp_path / RESULTS).read_text())
    figures = {"val/loss": {"unit": "nats per token", "better": "less"}}
    known = [("status", "completed"), ("parameters", 10), ("steps", 0), ("metrics", {"val/loss": 1.0})]
    assert list(plain.items()) == [*known, ("figures", figures)]


@pytest.mark.parametrize("text", ['{"status": "comp', "[1]", "{}", '{"status": 3}', "[" * 10_000, "\xff"])
def test_damaged_file_is_unreadable(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULTS).write_text(text, encoding="latin-1")
    assert Result.read(tmp_path).status == "unreadable" and not Result.read(tmp_path).ended


def test_run_without_a_file_is_unfinished(tmp_path: Path) -> None:
    assert Result.read(tmp_path).status == "unfinished" and not Result.read(tmp_path).ended


@pytest.mark.parametrize(("value", "kept"), [(1e999, True), (3, True), (True, False), ("1", False), (10**400, False)])
def test_only_numbers_that_a_float_can_hold_are_figures(tmp_path: Path, value: Any, kept: bool) -> None:
    document = {"status": "completed", "steps": value, "metrics": {"val/loss": value, "val/nan": math.nan}, "reason": 3}
    (tmp_path / RESULTS).write_text(json.dumps(document))
    result = Result.read(tmp_path)
    assert ("val/loss" in result.metrics, result.steps is not None) == (kept, kept)
    assert math.isnan(result.metrics["val/nan"]) and result.reason == ""


def test_figures_that_are_not_described_so_are_left_out(tmp_path: Path) -> None:
    figures = {
        "val/loss": {"unit": "nats", "better": "less"},
        "val/a": {"unit": "\x1b[31m", "better": "less"},
        "val/b": 1,
    }
    (tmp_path / RESULTS).write_text(json.dumps({"status": "completed", "figures": figures}))
    assert list(Result.read(tmp_path).figures) == ["val/loss"]


def test_value_is_finite_and_of_a_completed_run() -> None:
    metrics = {"val/loss": 1.0, "val/nan": math.nan}
    assert Result("completed", metrics=metrics).value("val/loss") == 1.0
    assert Result("completed", metrics=metrics).value("val/nan") is None
    assert Result("failed", metrics=metrics).value("val/loss") is None


def test_failure_keeps_the_figures_that_were_there(tmp_path: Path) -> None:
    Result("completed", 10, metrics={"val/loss": 1.0}).write(tmp_path)
    record_failure(tmp_path, "worse than others", "pruned", {"val/accuracy": 0.5})
    metrics = {"val/loss": 1.0, "val/accuracy": 0.5}
    assert Result.read(tmp_path) == Result("pruned", 10, metrics=metrics, reason="worse than others")
