"""A sweep that is resumed ends as one that was never stopped: with its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ladder_folder
import pytest
import sweep_folder

from blockwright.lab.sweep.__main__ import main
from blockwright.registry import ConfigError
from blockwright.training.result import Result


def test_resumed_sweep_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep := tmp_path / "sweep").mkdir()
    sweep_folder.ablation(sweep)
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


@pytest.mark.parametrize(("key", "value"), [("tries", {"optimizer.lr": 0}), ("tries", {"lr": 1e308}), ("lr", 1e308)])
def test_plan_with_a_value_that_has_no_octaves_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    (sweep := tmp_path / "sweep").mkdir()
    plan = json.loads((sweep_folder.ablation(sweep) / "plan.json").read_text())
    plan["jobs"][0][key] = value
    (sweep / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=key):
        main(["resume", str(sweep)])


@pytest.mark.slow
def test_resumed_ladder_is_reported_though_a_loss_is_a_huge_integer(tmp_path: Path) -> None:
    ladder = ladder_folder.write(tmp_path / "ladder", {"plain": (1, 1), "changed": (1.1, 1.1)})
    ladder_folder.finish(ladder, 14, 10**30)
    assert main(["resume", str(ladder)]) == 0 and (ladder / "report" / "verdict.json").is_file()
