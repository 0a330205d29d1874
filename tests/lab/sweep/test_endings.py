"""A sweep that is resumed ends as one that was never stopped: with its report."""

from __future__ import annotations

from pathlib import Path

import ladder_folder
import pytest
import sweep_folder

from blockwright.lab.sweep.__main__ import main
from blockwright.training.result import Result


@pytest.mark.parametrize("kind", ["ablation", "ladder"])
def test_resumed_sweep_is_reported(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep := tmp_path / "sweep").mkdir()
    if kind == "ablation":
        sweep_folder.ablation(sweep)
    else:
        ladder_folder.write(sweep, {"plain": (1, 1), "changed": (1.1, 1.1)})
    assert main(["resume", str(sweep)]) == 0
    report = {file.name for file in (sweep / "report").iterdir()}
    assert {"index.html", "report.md", "verdict.json", "runs.csv"} <= report
    assert str(sweep / "report" / "index.html") in capsys.readouterr().out.replace("\n", "")


def test_resumed_sweep_without_any_figure_is_not_reported(tmp_path: Path) -> None:
    (sweep := tmp_path / "sweep").mkdir()
    sweep_folder.ablation(sweep)
    for job in (folder for folder in sweep.iterdir() if folder.is_dir()):
        Result("failed", reason="no").write(job)
    assert main(["resume", str(sweep)]) == 1 and not (sweep / "report").exists()
