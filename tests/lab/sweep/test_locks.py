"""Locks of sweeps: no two processes run one, and none runs beside a job that has outlived its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockwright.lab.sweep.locks import is_taken, take_sweep
from blockwright.registry import ConfigError
from blockwright.training.claims import take


def test_sweep_is_run_by_one_process_and_not_while_a_job_of_it_still_runs(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    job = take(tmp_path / "3")
    assert job is not None and is_taken(tmp_path / "3")
    with pytest.raises(ConfigError, match=r"is still running \(job 3\)") as refused:
        take_sweep(tmp_path)
    assert "blockwright sweep status" in refused.value.remedy and not is_taken(tmp_path)
    os.close(job)
    sweep = take_sweep(tmp_path)
    with pytest.raises(ConfigError, match="is still running"):
        take_sweep(tmp_path)
    os.close(sweep)
