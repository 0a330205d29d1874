"""The record of a run: numbers of a damaged or hostile folder are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockwright.lab.difference.record import _tokens


@pytest.mark.parametrize(
    ("each", "steps"), [(10**400, 2.0), (5, float("inf")), (5, float("nan")), (5, None), ("x", 2.0)]
)
def test_tokens_that_no_run_has_are_not_shown(each: object, steps: float | None, tmp_path: Path) -> None:
    (tmp_path / "curves.json").write_text(json.dumps({"tokens_per_step": each}))
    assert _tokens(tmp_path, steps) == {}


def test_tokens_are_those_of_all_steps(tmp_path: Path) -> None:
    (tmp_path / "curves.json").write_text(json.dumps({"tokens_per_step": 5}))
    assert _tokens(tmp_path, 3.0) == {"tokens": 15}
