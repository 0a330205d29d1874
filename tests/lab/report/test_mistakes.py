"""blockwright report: one message and exit code 64 where there is nothing to report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import completed, grid, write_job

from blockwright.lab.ablation.__main__ import main as ablate
from blockwright.lab.report.__main__ import main
from blockwright.registry import REFUSED
from blockwright.registry.command import run_command

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that must be refused; what it says."""

    def refuse(*arguments: str | Path) -> str:
        assert run_command(main, [str(a) for a in arguments]) == REFUSED
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == 3
        return said.err

    return refuse


def test_report_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, 2.0]})
    assert run_command(main, [str(tmp_path), "--baseline", "mla", "--metric", "test/loss"]) == 0
    said = capsys.readouterr().out
    assert "mla is the baseline: test/loss" in " ".join(said.split())
    assert (tmp_path / "report" / "index.html").exists()


def test_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "2026-11-25").mkdir()
    said = refused(tmp_path / "2026-11-26")
    assert "is not a folder" in said and "Did you mean '2026-11-25'?" in said and "blockwright ablate" in said
    assert "is not a folder" in refused(tmp_path / "a" / "b")


def test_folder_that_is_empty_or_no_sweeps(refused: Refused, tmp_path: Path) -> None:
    assert "is empty, so it is not a sweep's folder" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "holds no jobs (folders 0, 1, 2 …)" in refused(tmp_path)


def test_folder_of_one_run(refused: Refused, tmp_path: Path) -> None:
    run = write_job(tmp_path, 0, ["seed=1"], completed(2.0))
    assert "is the folder of one run, but a report compares several" in refused(run)
    assert not (run / "report").exists()


def test_sweep_that_has_just_begun(refused: Refused, tmp_path: Path) -> None:
    said = refused(grid(tmp_path, {"mha": [None, None]}))
    assert "none of its 2 jobs has a figure (2 unfinished)" in said and "blockwright sweep resume" in said


def test_sweep_that_failed_altogether_names_the_reason(refused: Refused, tmp_path: Path) -> None:
    for i in range(2):
        write_job(tmp_path, i, [f"seed={i}"], {"status": "failed", "reason": "OSError: no disk\nat all"})
    assert "none of its 2 jobs has a figure (2 failed; most often: OSError: no disk)" in refused(tmp_path)


def test_unknown_baseline_and_metric(refused: Refused, tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    assert "Did you mean 'mla'?" in refused(tmp_path, "--baseline", "mlaa")
    said = refused(tmp_path, "--metric", "tst/loss")
    assert "no run of the sweep logged it" in said and "Did you mean 'test/loss'?" in said


def test_plan_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    nameless = {"jobs": [], "arms": [{"overrides": []}]}
    seed = {"jobs": [{"job": 0, "overrides": [], "seed": "a"}]}
    number, five = {"jobs": [{"job": "a", "overrides": []}]}, {"arms": 5}
    for text in ("{", *map(json.dumps, ([1], nameless, {"jobs": [{"job": 0}]}, seed, number, five, {"metric": None}))):
        (tmp_path / "plan.json").write_text(text)
        said = refused(tmp_path)
        assert "plan.json" in said and "cannot be read" in said


def test_unknown_option(refused: Refused, tmp_path: Path) -> None:
    assert "--baseline" in refused(tmp_path, "--baselin", "x")
    assert "DIR" in refused()


def test_report_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    (tmp_path / "report").write_text("a file in the way")
    assert "cannot be written" in refused(tmp_path)


def test_sweep_in_which_all_diverged_says_so(refused: Refused, tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [math.nan], "mla": [math.inf]})
    assert "none of its 2 jobs has a figure (2 without a finite val/loss)" in refused(tmp_path)


@pytest.mark.parametrize("command, arguments", [(main, ["DIR"]), (ablate, ["deepseek_v2_attention"])])
def test_without_its_packages_a_report_is_refused_before_a_run_is(
    command: Callable[..., Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("jinja2", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_command(command, arguments) == REFUSED
    said = capsys.readouterr().err
    assert "(jinja2, scipy)" in said and "pip install 'blockwright[lab]'" in said


@pytest.mark.slow
def test_ablation_is_planned_without_the_packages_of_its_report(tmp_path: Path) -> None:
    """In a process of its own: it may be loaded already. The plan needs SciPy, which says what it will see."""
    program = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from blockwright.lab.ablation.__main__ import main\n"
        f"sys.exit(main(['deepseek_v2_attention', '--plan-only', 'paths.log_dir={tmp_path}', 'data=sorting']))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=tmp_path)
    assert list(tmp_path.glob("ablation/deepseek_v2_attention/*/plan.json"))
