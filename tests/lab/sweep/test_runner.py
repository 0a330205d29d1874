"""The runner of a plan's jobs, with a stand-in for train.py that takes no time. The real one: tests/test_sweeps.py."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_in import STAND_IN, calls, make_plan, statuses, until
from warm import Running, Warm

from blockwright.lab.report.__main__ import main as report
from blockwright.lab.sweep import locks, runner
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.__main__ import main
from blockwright.lab.sweep.callback import SWEEPER
from blockwright.lab.sweep.table import rows_of
from blockwright.registry import ConfigError
from blockwright.registry.quoting import quoted
from blockwright.training.result import RESULTS, Result
from blockwright.training.writing import write_json

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr("blockwright.training.jobs.TRAIN", (str(file),))
    monkeypatch.setattr("blockwright.lab.sweep.forking.IMPORTED", ())  # it needs none
    return file


@pytest.fixture
def started(stand_in: Path, warm: Warm, environment: dict[str, str]) -> Callable[[Path], Running]:
    """``run_plan`` of a folder in a process of its own."""

    def start(sweep: Path) -> Running:
        code = f"""
import sys
from pathlib import Path
from blockwright.lab.sweep import forking, runner
from blockwright.training import jobs
jobs.TRAIN, forking.IMPORTED = ({str(stand_in)!r},), ()
sys.exit(runner.run_plan(Path({str(sweep)!r})))
"""
        return warm.start("-c", code, cwd=ROOT, env=environment)

    return start


def test_each_job_ends_as_it_ends_and_the_others_continue(stand_in: Path, tmp_path: Path) -> None:
    ways = ("do=ok loss=3", "do=refuse", "do=diverge", "do=crash", "do=kill", "do=silent", "do=bare", "do=ok loss=2")
    sweep = make_plan(tmp_path / "sweep", *ways)
    assert runner.run_plan(sweep) == 0
    rows = rows_of(sweep)
    good, bad = "completed", "failed"
    assert [row["status"] for row in rows] == [good, bad, "diverged", bad, bad, bad, good, good]
    assert [row["reason"] for row in rows] == [
        "",
        "model.x = 7: must divide y (64). Write 8",
        "diverged at step 2: its loss is nan",
        "RuntimeError: it broke\nin two lines",
        "killed by SIGKILL (out of memory?)",
        "hello",
        "",
        "",
    ]
    assert (sweep / "summary.csv").is_file()
    assert "hello" in (sweep / "0" / runner.LOG).read_text()


def test_progress_is_told_line_by_line_where_there_is_no_terminal(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=3", "do=diverge", "do=ok loss=2")
    runner.run_plan(sweep, workers=1)
    said = capsys.readouterr().out.splitlines()
    assert "job 0 starts: do=ok loss=3" in said
    assert any(line.startswith("job 0 done: val/loss 3.0000; 1/3 ended; best 3.0000 (job 0)") for line in said)
    assert any(line.startswith("job 1 diverged: diverged at step 2") and "2/3 ended" in line for line in said)
    assert any(line.startswith("job 2 done: val/loss 2.0000; 3/3 ended; best 2.0000 (job 2)") for line in said)


@pytest.mark.slow
def test_only_what_has_not_ended_runs(stand_in: Path, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=3", "do=crash", "do=ok loss=2")
    runner.run_plan(sweep, jobs=[0, 1])
    assert statuses(sweep) == ["completed", "failed", "unfinished"]
    assert runner.run_plan(sweep) == 0
    assert [len(calls(sweep / n)) for n in "012"] == [1, 1, 1]


def test_as_many_run_at_a_time_as_asked(stand_in: Path, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", *["do=ok loss=3"] * 3)
    runner.run_plan(sweep, workers=1)
    ends = [(sweep / n / "results.json").stat().st_mtime for n in "012"]
    assert all(calls(sweep / str(i + 1))[0]["at"] > ends[i] - 0.01 for i in (0, 1))


def test_job_runs_where_the_sweep_began_with_its_share_of_the_cores(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "began").mkdir()
    flags = ["--config-dir", "x"]
    sweep = make_plan(tmp_path / "a sweep", "do=ok loss=3 auto_resume=true", cwd=str(tmp_path / "began"), flags=flags)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    runner.run_plan(sweep, workers=2)
    (call,) = calls(sweep / "0")
    assert (call["cwd"], call["OMP_NUM_THREADS"], call["RANK"]) == (str(tmp_path / "began"), "4", None)
    own = ["seed=1", "do=ok", "loss=3", "auto_resume=true"]
    run = ["hydra.mode=RUN", f"hydra.run.dir='{sweep}/0'", "auto_resume=false"]
    assert call["argv"] == [*flags, *own, *run]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert runner.environment(2)["OMP_NUM_THREADS"] == "5"


def test_stopped_jobs_save_and_resume_from_their_own_checkpoints(
    started: Callable[[Path], Running], tmp_path: Path
) -> None:
    from blockwright.training.checkpoints.atomic import write_file

    sweep = make_plan(tmp_path / "sweep", "do=wait loss=3", "do=wait loss=2", "do=ok loss=1")
    process = started(sweep)
    until(lambda: (sweep / "0" / "waits").exists() and (sweep / "1" / "waits").exists())
    with pytest.raises(ConfigError, match="still running"):
        runner.run_plan(sweep)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 75
    assert said.splitlines()[-1] == f"stopped by SIGTERM. Resume with: blockwright sweep resume {sweep}"
    assert statuses(sweep) == ["unfinished"] * 3
    assert not (sweep / "2").exists()

    write_file({"a": 1}, sweep / "1" / "checkpoints" / "last.ckpt")
    (sweep / "go").touch()
    assert main(["resume", str(sweep)]) == 0
    assert statuses(sweep) == ["completed"] * 3
    assert f"ckpt_path={sweep}/1/checkpoints/last.ckpt" in calls(sweep / "1")[1]["argv"]
    assert not any(a.startswith("ckpt_path") for a in calls(sweep / "0")[1]["argv"])


def test_job_that_outlives_its_runner_keeps_the_sweep_locked(
    started: Callable[[Path], Running], tmp_path: Path
) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=wait loss=3")
    process = started(sweep)
    until(lambda: (sweep / "0" / "waits").exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(ConfigError, match="still running"):
        main(["resume", str(sweep)])
    (sweep / "go").touch()
    until(lambda: not locks.is_taken(sweep))
    assert statuses(sweep) == ["completed"]


@pytest.mark.slow
def test_retry_runs_what_failed_again_and_keeps_what_it_said(stand_in: Path, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=3", "do=crash", "do=diverge", "do=ok loss=2")
    runner.run_plan(sweep, jobs=[0, 1, 2])
    assert main(["retry", str(sweep), "--jobs", "1"]) == 0
    assert [len(calls(sweep / n)) for n in "012"] == [1, 2, 1]
    assert "it broke" in (sweep / "1" / "results.previous.json").read_text()
    assert statuses(sweep) == ["completed", "failed", "diverged", "unfinished"]
    assert main(["retry", str(sweep)]) == 0
    assert [len(calls(sweep / n)) for n in "0123"] == [1, 3, 2, 1]


@pytest.mark.slow
def test_retried_job_that_diverged_starts_anew_and_one_that_failed_resumes(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from blockwright.training.checkpoints.atomic import write_file

    sweep = make_plan(tmp_path / "sweep", "do=crash", "do=diverge")
    runner.run_plan(sweep)
    for job in "01":
        kept = tmp_path / "kept" / job
        write_file({"a": 1}, kept / "last.ckpt")
        (sweep / job / "checkpoints").symlink_to(kept)
    assert main(["retry", str(sweep)]) == 1  # both end as before
    assert any(a.startswith("ckpt_path=") for a in calls(sweep / "0")[1]["argv"])
    assert not any(a.startswith("ckpt_path=") for a in calls(sweep / "1")[1]["argv"])
    assert "job 1 diverged: it restarts from scratch" in capsys.readouterr().out
    assert not (sweep / "1" / "checkpoints").is_symlink() and not kept.exists()
    (aside,) = kept.parent.glob(f"{kept.name}.diverged.*")
    assert (aside / "last.ckpt").is_file()


def test_job_resumes_from_its_own_folder_whatever_a_file_says(stand_in: Path, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=3")
    runner.run_plan(sweep)
    assert "auto_resume=false" in calls(sweep / "0")[0]["argv"]


def test_status_says_what_each_job_has_come_to(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=nan", "do=crash", "do=ok loss=2", "do=ok loss=1")
    runner.run_plan(sweep, jobs=[0, 1, 2])
    capsys.readouterr()
    assert main(["status", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert "not running: 2 completed, 1 failed, 1 unfinished" in said and "best val/loss: 2.0000 (job 2)" in said
    assert "RuntimeError: it broke" in said
    lock = locks.take(sweep)
    assert lock is not None
    main(["status", str(sweep), "--json"])
    os.close(lock)
    told = json.loads(capsys.readouterr().out)
    assert told["running"] and told["best"] == {"job": 2, "value": 2.0}
    assert told["counts"] == {"completed": 2, "failed": 1, "waiting": 1}
    assert told["jobs"][0]["val/loss"] is None and told["jobs"][1]["reason"] == "RuntimeError: it broke\nin two lines"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["staus", "SWEEP"], "Did you mean 'status'"),
        (["status", "SWEEP/nowhere"], "there is no such folder"),
        (["status", "SWEEP/other"], "is not a sweep's plan"),
        (["resume", "SWEEP", "--workers", "0"], "is the number of parallel jobs"),
        (["retry", "SWEEP", "--jobs", "0"], "is completed"),
        (["retry", "SWEEP", "--jobs", "one"], "must be a list of job numbers"),
        (["resume", "SWEEP", "--jobs", "1"], "is an option of retry"),
        (["resume", "SWEEP/search"], "cannot resume"),
        (["resume", "SWEEP/gone"], "was the sweep's working directory"),
        (["resume", "SWEEP/blocked"], "is a file in place of a job's folder"),
        (["retry", "SWEEP/bare"], "lacks study, n_trials"),
        (["resume", "SWEEP/lost study"], r"study\.db .*is missing.*runs are still in their folders"),
    ],
)
def test_mistake_is_one_message_and_nothing_is_touched(arguments: list[str], told: str, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path, "do=ok loss=1", "do=crash")
    (sweep / "0").mkdir()
    write_json(sweep / "0" / RESULTS, {"status": "completed", "metrics": {"val/loss": 1.0}})
    for name, content in {"empty": None, "damaged": "{", "other": '{"kind": "walk"}'}.items():
        (sweep / name).mkdir()
        if content is not None:
            (sweep / name / plans.PLAN).write_text(content)
    searched = {"kind": "search", "metric": "m", "direction": "minimize", "sweeper": "a.nevergrad.Sweeper"}
    plans.write(sweep / "search", searched)
    make_plan(sweep / "gone", "do=ok loss=1", cwd=str(tmp_path / "away"))
    make_plan(sweep / "lost", "do=crash")
    (sweep / "lost" / "0").mkdir()
    write_json(sweep / "lost" / "0" / RESULTS, {"status": "failed", "reason": "x"})
    make_plan(sweep / "blocked", "do=ok loss=1")
    (sweep / "blocked" / "0").write_text("")
    ours = {**searched, "sweeper": SWEEPER, "argv": []}
    plans.write(sweep / "bare", ours)
    plans.write(sweep / "lost study", {**ours, "study": {"name": "s", "storage": None}, "n_trials": 3})
    (sweep / "lost study" / "0").mkdir()
    with pytest.raises(ConfigError, match=told):
        main([a.replace("SWEEP", str(sweep)) for a in arguments])
    assert statuses(sweep) == ["completed", "unfinished"] and statuses(sweep / "lost") == ["failed"]


DAMAGED: list[dict[str, Any]] = [
    {"jobs": 5},
    {"jobs": [{}]},
    {"jobs": ["a"]},
    {"jobs": [{"job": "a", "overrides": []}]},
    {"jobs": [{"job": 0, "overrides": "a=1"}]},
    {"jobs": [{"job": 0, "overrides": [1]}]},
    {"jobs": [{"job": 0, "overrides": []}] * 2},
    {"workers": "two"},
    {"cwd": None},
    {"metric": None},
    {"jobs": None},
    {"also": 5},
    {"jobs": [], "arms": [{"name": "a", "overrides": []}]},
    *(
        {"jobs": [{"job": 0, "overrides": [], **wrong}]}
        for wrong in ({"lr": []}, {"lr": -1.0}, {"lr": math.inf}, {"seed": {}}, {"job": 10**30}, {"arm": 5})
    ),
    *(
        {"arms": [{"name": "a", "overrides": [], **wrong}]}
        for wrong in ({"figures": [1]}, {"match": 5}, {"match": {"tol": "x"}}, {"match": {"residual": {"a": "x"}}})
    ),
]


def test_plan_with_a_value_that_cannot_be_is_damaged(tmp_path: Path) -> None:
    read = []
    for number, wrong in enumerate(DAMAGED):
        try:
            main(["status", str(make_plan(tmp_path / str(number), "do=ok loss=1", **wrong))])
        except ConfigError as error:
            assert "is damaged" in str(error), wrong
        else:
            read.append(wrong)
    assert not read


def test_what_was_half_written_does_not_hide_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans.write(tmp_path, {"kind": "search", "metric": "val/loss", "direction": "minimize"})
    for n, metrics in enumerate([None, [1], {"val/loss": "low"}, {"val/loss": 2.5}]):
        (tmp_path / str(n) / ".hydra").mkdir(parents=True)
        write_json(tmp_path / str(n) / RESULTS, {"status": "completed", "metrics": metrics})
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("a: [b")
    assert main(["status", str(tmp_path)]) == 0
    assert "best val/loss: 2.5000 (job 3)" in capsys.readouterr().out


WRONG: list[dict[str, Any]] = [
    {"status": ["completed"]},
    {"active_parameters": "many"},
    {"fit_seconds": {}},
    {"parameters": 10**400},
    {"reason": [1]},
    {"metrics": {"val/loss": 2.5, "val/bits_per_byte": 10**400}},
]


def test_results_that_no_run_writes_cost_their_figures_only(tmp_path: Path) -> None:
    make_plan(tmp_path, *(f"a={n}" for n in range(len(WRONG) + 1)))
    for n, more in enumerate(({}, *WRONG)):
        (tmp_path / str(n)).mkdir()
        write_json(tmp_path / str(n) / RESULTS, {"status": "completed", "metrics": {"val/loss": 2.5}, **more})
    assert main(["status", str(tmp_path)]) == 0 and report([str(tmp_path)]) is None


def test_path_with_odd_characters_is_one_override() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for path in ("/a/b c", "/it's", "/a=b,c", "/{x}", "/ünï", "/back\\slash", "/end\\", "/both\\'", "/[0]", "/$HOME"):
        (parsed,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={quoted(path)}"])
        assert parsed.value() == path


def test_half_written_results_are_none(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text('{"status": "comp')
    assert Result.read(tmp_path).status == "unreadable"
