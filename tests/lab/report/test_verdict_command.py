"""blockwright verdict: what it prints, the document, and its exit codes."""

import json
import math
import subprocess
import sys

import pytest
from sweep_folder import completed, grid, write_job

from blockwright.lab.ablation.__main__ import main as ablate
from blockwright.lab.report import build
from blockwright.lab.report.terminal import report_command as report
from blockwright.lab.report.terminal import verdict_command
from blockwright.lab.report.verdict import SCHEMA
from blockwright.registry import REFUSED
from blockwright.registry.command import run_command

BETTER, OPEN, ONE = [1.9, 2.001, 2.1], [2.01, 2.09, 2.2], [1.9]
LOSSES = {0: {"mha": [2.0, 2.1, 2.2], "mla": BETTER}, 3: {"mha": [2.0, 2.1, 2.2], "mla": BETTER, "gqa": OPEN}}
LOSSES[4] = {"mha": [2.0, 2.1, 2.2], "mla": BETTER, "gqa": OPEN, "mqa": ONE}
NUMBER = (int, float)
KEYS = {
    "schema": str, "sweep": str, "metric": str, "unit": str, "better": str, "baseline": str,
    "within": (*NUMBER, type(None)),
    "looks": (dict, type(None)), "comparisons": int, "method": str, "calibration": (str, type(None)),
    "verdicts": list, "exit_code": int,
}  # fmt: skip
OF_AN_ARM = {
    "arm": str, "against": str, "kind": str, "text": str, "why": (str, type(None)), "difference": (*NUMBER, type(None)),
    "interval": (list, type(None)), "p": (*NUMBER, type(None)), "seeds": int, "sees": (*NUMBER, type(None)),
    "needs_seeds": (int, type(None)), "minutes": (*NUMBER, type(None)), "noise": (dict, type(None)),
}  # fmt: skip


@pytest.mark.parametrize("code", LOSSES)
def test_exit_code_says_whether_all_is_decided(code, tmp_path, capsys):
    grid(tmp_path, LOSSES[code])
    assert run_command(verdict_command, [str(tmp_path)]) == code
    said = " ".join(capsys.readouterr().out.split())
    assert "mla is better than mha by 0." in said and "mha is the baseline" in said
    assert ("undecided gqa − mha is between" in said) == (code > 0) and ("no verdict one seed" in said) == (code == 4)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("code", LOSSES)
def test_document_has_the_keys_that_are_documented(code, tmp_path, capsys):
    grid(tmp_path, LOSSES[code])
    assert run_command(verdict_command, [str(tmp_path), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == SCHEMA and found["exit_code"] == code
    assert found.keys() == KEYS.keys() and all(isinstance(found[key], kind) for key, kind in KEYS.items())
    for verdict in found["verdicts"]:
        assert verdict.keys() == OF_AN_ARM.keys()
        assert all(isinstance(verdict[key], kind) for key, kind in OF_AN_ARM.items())
        assert (verdict["kind"] == "none") == (verdict["why"] is not None)


def test_report_has_the_same_document(tmp_path, capsys):
    grid(tmp_path, LOSSES[4])
    assert run_command(report, [str(tmp_path)]) == 0
    capsys.readouterr()
    run_command(verdict_command, [str(tmp_path), "--json"])
    assert (tmp_path / "report" / build.VERDICT).read_text() == capsys.readouterr().out


def test_document_is_json_even_of_numbers_that_are_not(tmp_path, capsys):
    grid(tmp_path, {"mha": [1e300, -1e300, 2.0], "mla": [2.0, 1e200, 5e-324], "gqa": [2.0, 2.1, 2.2]})
    run_command(verdict_command, [str(tmp_path), "--json"])

    def refuse(constant):
        raise AssertionError(constant)

    assert len(json.loads(capsys.readouterr().out, parse_constant=refuse)["verdicts"]) == 2


def _search(folder):
    grid(folder, {"mha": [2.0], "mla": [1.9]})
    plan = {"kind": "search", "name": "s", "metric": "val/loss", "direction": "minimize"}
    (folder / "plan.json").write_text(json.dumps(plan))


NONE = {
    "search": (_search, "is a search"),
    "one arm": (lambda folder: grid(folder, {"mha": [2.0, 2.1]}), "has one arm"),
    "empty": (lambda folder: None, "is empty"),
}


@pytest.mark.parametrize("case", NONE)
def test_folder_without_a_comparison_is_refused(case, tmp_path, capsys):
    make, rule = NONE[case]
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(verdict_command, [str(tmp_path)]) == REFUSED
    said = capsys.readouterr()
    assert rule in said.err and said.out == "" and sorted(tmp_path.rglob("*")) == before


def failed(folder):
    for i in range(2):
        write_job(folder, i, [f"seed={i}"], {"status": "failed", "reason": "OSError: no disk\nat all"})


def blocked(folder):
    grid(folder, TWO)
    (folder / "report").write_text("a file in the way")


TWO = {"mha": [2.0], "mla": [1.9]}
MISTAKES = {  # how the folder is made, words after it, what is said
    "nowhere": (lambda folder: folder.rmdir() or (folder.parent / "sweep1").mkdir(), [], "Did you mean 'sweep1'?"),
    "empty": (lambda folder: None, [], "is empty"),
    "no jobs": (lambda folder: (folder / "notes.txt").touch(), [], "holds no jobs"),
    "one run": (lambda folder: write_job(folder, 0, ["seed=1"], completed(2.0)).rename(folder / "x"), ["x"], "one run"),
    "just begun": (lambda folder: grid(folder, {"mha": [None, None]}), [], "(2 unfinished)"),
    "all failed": (failed, [], "(2 failed; most often: OSError: no disk)"),
    "all diverged": (
        lambda folder: grid(folder, {"a": [math.nan], "b": [math.inf]}),
        [],
        "(2 without a finite val/loss)",
    ),
    "baseline": (lambda folder: grid(folder, TWO), ["--baseline", "mlaa"], "Did you mean 'mla'?"),
    "metric": (lambda folder: grid(folder, TWO), ["--metric", "tst/loss"], "Did you mean 'test/loss'?"),
    "option": (lambda folder: grid(folder, TWO), ["--baselin", "x"], "--baseline"),
    "in the way": (blocked, [], "cannot be written"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_reported_is_one_message(case, tmp_path, capsys):
    make, words, told = MISTAKES[case]
    (folder := tmp_path / "sweep").mkdir()
    make(folder)
    given = [str(folder / "x")] if words == ["x"] else [str(folder), *words]
    assert run_command(report, given) == REFUSED
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 3 and told in said.err, said.err


def test_plan_that_cannot_be_read_is_one_message(tmp_path, capsys):
    grid(tmp_path, TWO)
    job = {"job": 0, "overrides": []}
    wrong = ({"arms": [{"overrides": []}], "jobs": []}, {"jobs": [{"job": 0}]}, {"jobs": [{**job, "seed": "a"}]}, [1])
    for text in ("{", *map(json.dumps, (*wrong, {"jobs": [{**job, "job": "a"}]}, {"arms": 5}, {"metric": None}))):
        (tmp_path / "plan.json").write_text(text)
        assert run_command(report, [str(tmp_path)]) == REFUSED
        said = capsys.readouterr().err
        assert "plan.json" in said and "cannot be read" in said


def test_report_is_written_and_shown(tmp_path, capsys):
    grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, 2.0]})
    assert run_command(report, [str(tmp_path), "--baseline", "mla", "--metric", "test/loss"]) == 0
    assert "mla is the baseline: test/loss" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "report" / "index.html").exists()


@pytest.mark.parametrize("command, arguments", [(report, ["DIR"]), (ablate, ["deepseek_v2_attention"])])
def test_without_its_packages_a_report_is_refused_before_a_run_is(command, arguments, monkeypatch, capsys):
    for name in ("jinja2", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_command(command, arguments) == REFUSED
    said = capsys.readouterr().err
    assert "(jinja2, scipy)" in said and "pip install 'blockwright[lab]'" in said


@pytest.mark.slow
def test_ablation_is_planned_without_the_packages_of_its_report(tmp_path):
    program = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from blockwright.lab.ablation.__main__ import main\n"
        f"sys.exit(main(['deepseek_v2_attention', '--plan-only', 'paths.log_dir={tmp_path}', 'data=sorting']))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=tmp_path)
    assert list(tmp_path.glob("ablation/deepseek_v2_attention/*/plan.json"))
