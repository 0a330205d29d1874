"""One job by the command line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from blockwright.training import claims


def test_folder_of_a_run_that_still_runs_is_refused(
    train_py: Callable[..., subprocess.CompletedProcess[str]], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    with claims.only_writer(tmp_path / "run"):
        done = train_py(*small, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 64 and "Traceback" not in done.stderr
    assert (
        f"error: hydra.run.dir = {tmp_path}/run\n  rule:   is the folder of a run that is still running" in done.stderr
    )
