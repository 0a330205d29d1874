"""blockwright verdict: what it prints, the document, and its exit codes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import grid

from blockwright.lab.report import build
from blockwright.lab.report.__main__ import main as report
from blockwright.lab.report.document import SCHEMA
from blockwright.lab.report.verdict_command import main
from blockwright.registry import REFUSED
from blockwright.registry.command import run_command

BETTER, OPEN, ONE = [1.9, 2.001, 2.1], [2.01, 2.09, 2.2], [1.9]
LOSSES = {0: {"mha": [2.0, 2.1, 2.2], "mla": BETTER}, 3: {"mha": [2.0, 2.1, 2.2], "mla": BETTER, "gqa": OPEN}}
LOSSES[4] = {"mha": [2.0, 2.1, 2.2], "mla": BETTER, "gqa": OPEN, "mqa": ONE}
NUMBER = (int, float)
KEYS: dict[str, Any] = {
    "schema": str, "sweep": str, "metric": str, "unit": str, "better": str, "baseline": str,
    "within": (*NUMBER, type(None)),
    "looks": (dict, type(None)), "comparisons": int, "method": str, "calibration": (str, type(None)),
    "verdicts": list, "exit_code": int,
}  # fmt: skip
OF_AN_ARM: dict[str, Any] = {
    "arm": str, "against": str, "kind": str, "text": str, "why": (str, type(None)), "difference": (*NUMBER, type(None)),
    "interval": (list, type(None)), "p": (*NUMBER, type(None)), "seeds": int, "sees": (*NUMBER, type(None)),
    "needs_seeds": (int, type(None)), "minutes": (*NUMBER, type(None)), "noise": (dict, type(None)),
}  # fmt: skip


@pytest.mark.parametrize("code", LOSSES)
def test_exit_code_says_whether_all_is_decided(code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid(tmp_path, LOSSES[code])
    assert run_command(main, [str(tmp_path)]) == code
    said = " ".join(capsys.readouterr().out.split())
    assert "mla is better than mha by 0." in said and "mha is the baseline" in said
    assert ("undecided gqa − mha is between" in said) == (code > 0) and ("no verdict one seed" in said) == (code == 4)
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
@pytest.mark.parametrize("code", LOSSES)
def test_shell_sees_the_exit_code(code: int, tmp_path: Path) -> None:
    grid(tmp_path, LOSSES[code])
    script = f"{shlex.quote(sys.executable)} -m blockwright.lab.report.verdict_command . > said; echo $?"
    ended = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.stdout == f"{code}\n" and "mla is better than mha" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("code", LOSSES)
def test_document_has_the_keys_that_are_documented(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid(tmp_path, LOSSES[code])
    assert run_command(main, [str(tmp_path), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == SCHEMA and found["exit_code"] == code
    assert found.keys() == KEYS.keys() and all(isinstance(found[key], kind) for key, kind in KEYS.items())
    for verdict in found["verdicts"]:
        assert verdict.keys() == OF_AN_ARM.keys()
        assert all(isinstance(verdict[key], kind) for key, kind in OF_AN_ARM.items())
        assert (verdict["kind"] == "none") == (verdict["why"] is not None)
    guide = (Path(__file__).parents[3] / "docs" / "how-to" / "report.md").read_text()
    assert all(f"`{key}`" in guide for key in (*KEYS, *OF_AN_ARM, SCHEMA))


def test_report_has_the_same_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid(tmp_path, LOSSES[4])
    assert run_command(report, [str(tmp_path)]) == 0
    capsys.readouterr()
    run_command(main, [str(tmp_path), "--json"])
    assert (tmp_path / "report" / build.VERDICT).read_text() == capsys.readouterr().out


def test_document_is_json_even_of_numbers_that_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid(tmp_path, {"mha": [1e300, -1e300, 2.0], "mla": [2.0, 1e200, 5e-324], "gqa": [2.0, 2.1, 2.2]})
    run_command(main, [str(tmp_path), "--json"])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert len(json.loads(capsys.readouterr().out, parse_constant=refuse)["verdicts"]) == 2


def _search(folder: Path) -> None:
    grid(folder, {"mha": [2.0], "mla": [1.9]})
    plan = {"kind": "search", "name": "s", "metric": "val/loss", "direction": "minimize"}
    (folder / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (_search, "is a search"),
        (lambda folder: grid(folder, {"mha": [2.0, 2.1]}), "has one arm"),
        (lambda folder: None, "is empty"),
        (lambda folder: grid(folder, {"mha": [None], "mla": [None]}), "none of its 2 jobs has a figure"),
    ],
    ids=["search", "one arm", "empty", "nothing yet"],
)
def test_folder_without_a_comparison_is_refused(
    make: Callable[[Path], Any], rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(main, [str(tmp_path)]) == REFUSED
    said = capsys.readouterr()
    assert rule in said.err and said.out == "" and len(said.err.splitlines()) == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_help_says_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(code in said for code in ("Exit code 0:", "3: some are undecided", "4: on some there is no verdict"))
