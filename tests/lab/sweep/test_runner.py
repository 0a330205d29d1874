"""The runner of a plan's jobs, with a stand-in for train.py that takes no time. The real one: tests/test_sweeps.py."""

import json
import math
import os
import signal

import ladder_folder
import pytest
import sweep_folder
from stand_in import calls, make_plan, statuses, until

from blockwright.lab.report.terminal import report_command as report
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep import runner
from blockwright.lab.sweep.__main__ import main
from blockwright.lab.sweep.callback import SWEEPER
from blockwright.lab.sweep.table import rows_of
from blockwright.registry import ConfigError
from blockwright.registry.command import quoted
from blockwright.registry.folder import write_json
from blockwright.training import claims
from blockwright.training.claims import take
from blockwright.training.result import RESULTS, Result


def test_each_job_ends_as_it_ends_and_the_others_continue(stand_in, tmp_path):
    ways = ("do=ok loss=3", "do=refuse", "do=diverge", "do=crash", "do=kill", "do=silent", "do=bare", "do=ok loss=2")
    sweep = make_plan(tmp_path / "sweep", *ways)
    assert runner.run_plan(sweep) == 0
    rows = rows_of(sweep)
    good, bad = "completed", "failed"
    assert [row["status"] for row in rows] == [good, bad, "diverged", bad, bad, bad, good, good]
    reasons = ["model.x = 7: must divide y (64). Write 8", "diverged at step 2: its loss is nan"]
    reasons += ["RuntimeError: it broke\nin two lines", "killed by SIGKILL (out of memory?)", "hello"]
    assert [row["reason"] for row in rows] == ["", *reasons, "", ""]
    assert (sweep / "summary.csv").is_file()
    assert "hello" in (sweep / "0" / runner.LOG).read_text()


def test_as_many_run_at_a_time_as_asked_and_only_what_has_not_ended(stand_in, tmp_path):
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=3", "do=crash", "do=ok loss=2", "do=ok loss=1")
    runner.run_plan(sweep, jobs=[0, 1])
    assert statuses(sweep) == ["completed", "failed", "unfinished", "unfinished"]
    assert runner.run_plan(sweep, workers=1) == 0
    assert [len(calls(sweep / n)) for n in "0123"] == [1, 1, 1, 1]
    assert calls(sweep / "3")[0]["at"] > (sweep / "2" / "results.json").stat().st_mtime - 0.01


def test_job_runs_where_the_sweep_began_with_its_share_of_the_cores(stand_in, tmp_path, monkeypatch):
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


def test_stopped_jobs_save_and_resume_from_their_own_checkpoints(run_apart, tmp_path):
    from blockwright.training.checkpoints.atomic import write_file

    sweep = make_plan(tmp_path / "sweep", "do=wait loss=3", "do=wait loss=2", "do=ok loss=1")
    process = run_apart(sweep)
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


@pytest.mark.slow
def test_retry_runs_what_failed_again_and_keeps_what_it_said(stand_in, tmp_path):
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=3", "do=crash", "do=diverge", "do=ok loss=2")
    runner.run_plan(sweep, jobs=[0, 1, 2])
    assert main(["retry", str(sweep), "--jobs", "1"]) == 0
    assert [len(calls(sweep / n)) for n in "012"] == [1, 2, 1]
    assert "it broke" in (sweep / "1" / "results.previous.json").read_text()
    assert statuses(sweep) == ["completed", "failed", "diverged", "unfinished"]
    assert main(["retry", str(sweep)]) == 0
    assert [len(calls(sweep / n)) for n in "0123"] == [1, 3, 2, 1]


@pytest.mark.slow
def test_retried_job_that_diverged_starts_anew_and_one_that_failed_resumes(stand_in, tmp_path, capsys):
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


def test_status_says_what_each_job_has_come_to(stand_in, tmp_path, capsys):
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=nan", "do=crash", "do=ok loss=2", "do=ok loss=1")
    runner.run_plan(sweep, jobs=[0, 1, 2])
    capsys.readouterr()
    assert main(["status", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert "not running: 2 completed, 1 failed, 1 unfinished" in said and "best val/loss: 2.0000 (job 2)" in said
    lock = claims.take(sweep)
    main(["status", str(sweep), "--json"])
    os.close(lock)
    told = json.loads(capsys.readouterr().out)
    assert told["running"] and told["best"] == {"job": 2, "value": 2.0}
    assert told["counts"] == {"completed": 2, "failed": 1, "waiting": 1}
    assert told["jobs"][0]["val/loss"] is None and told["jobs"][1]["reason"] == "RuntimeError: it broke\nin two lines"


MISTAKES = [  # words, and the folder or option that is refused
    (["staus", "SWEEP"], "status"),
    (["status", "SWEEP/nowhere"], "no such folder"),
    (["status", "SWEEP/other"], "not a sweep's plan"),
    (["resume", "SWEEP", "--workers", "0"], "workers = 0"),
    (["retry", "SWEEP", "--jobs", "0"], "completed"),
    (["retry", "SWEEP", "--jobs", "one"], "--jobs"),
    (["resume", "SWEEP", "--jobs", "1"], "option of retry"),
    (["resume", "SWEEP/search"], "cannot resume"),
    (["resume", "SWEEP/gone"], "working directory"),
    (["resume", "SWEEP/blocked"], "is a file"),
    (["retry", "SWEEP/bare"], "lacks study, n_trials"),
    (["resume", "SWEEP/lost study"], "is missing"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES)
def test_mistake_is_one_message_and_nothing_is_touched(arguments, told, tmp_path):
    sweep = make_plan(tmp_path, "do=ok loss=1", "do=crash")
    (sweep / "0").mkdir()
    write_json(sweep / "0" / RESULTS, {"status": "completed", "metrics": {"val/loss": 1.0}})
    (sweep / "other").mkdir()
    (sweep / "other" / plans.PLAN).write_text('{"kind": "walk"}')
    searched = {"kind": "search", "metric": "m", "direction": "minimize", "sweeper": "a.nevergrad.Sweeper"}
    plans.write(sweep / "search", searched)
    make_plan(sweep / "gone", "do=ok loss=1", cwd=str(tmp_path / "away"))
    make_plan(sweep / "blocked", "do=ok loss=1")
    (sweep / "blocked" / "0").write_text("")
    ours = {**searched, "sweeper": SWEEPER, "argv": []}
    plans.write(sweep / "bare", ours)
    plans.write(sweep / "lost study", {**ours, "study": {"name": "s", "storage": None}, "n_trials": 3})
    (sweep / "lost study" / "0").mkdir()
    with pytest.raises(ConfigError, match=told):
        main([a.replace("SWEEP", str(sweep)) for a in arguments])
    assert statuses(sweep) == ["completed", "unfinished"]


JOB, ARM = {"job": 0, "overrides": []}, {"name": "a", "overrides": []}
DAMAGED = [
    {"jobs": 5},
    {"jobs": [{}]},
    {"jobs": ["a"]},
    {"jobs": None},
    {"jobs": [JOB] * 2},
    {"jobs": [], "arms": [ARM]},
]
DAMAGED += [{"workers": "two"}, {"cwd": None}, {"metric": None}, {"also": 5}]
WRONG_JOBS = [{"job": "a"}, {"overrides": "a=1"}, {"overrides": [1]}, {"lr": []}, {"lr": -1.0}, {"lr": math.inf}]
DAMAGED += [{"jobs": [{**JOB, **wrong}]} for wrong in (*WRONG_JOBS, {"seed": {}}, {"job": 10**30}, {"arm": 5})]
WRONG_ARMS = [{"figures": [1]}, {"match": 5}, {"match": {"tol": "x"}}, {"match": {"residual": {"a": "x"}}}]
DAMAGED += [{"arms": [{**ARM, **wrong}]} for wrong in WRONG_ARMS]


def test_plan_with_a_value_that_cannot_be_is_damaged(tmp_path):
    for number, wrong in enumerate(DAMAGED):
        with pytest.raises(ConfigError, match="is damaged"):
            main(["status", str(make_plan(tmp_path / str(number), "do=ok loss=1", **wrong))])


WRONG = [{"status": ["completed"]}, {"active_parameters": "many"}, {"fit_seconds": {}}, {"parameters": 10**400}]
WRONG += [{"reason": [1]}, {"metrics": {"val/loss": 2.5, "val/bits_per_byte": 10**400}}, {"metrics": None}]


def test_results_that_no_run_writes_cost_their_figures_only(tmp_path, capsys):
    wrong = [*WRONG, {"metrics": [1]}, {"metrics": {"val/loss": "low"}}]
    make_plan(tmp_path, *(f"a={n}" for n in range(len(wrong) + 2)))
    for n, more in enumerate(({}, *wrong)):
        (tmp_path / str(n) / ".hydra").mkdir(parents=True)
        write_json(tmp_path / str(n) / RESULTS, {"status": "completed", "metrics": {"val/loss": 2.5}, **more})
    (tmp_path / "1" / ".hydra" / "overrides.yaml").write_text("a: [b")
    (half := tmp_path / str(len(wrong) + 1)).mkdir()
    (half / RESULTS).write_text('{"status": "comp')
    assert Result.read(half).status == "unreadable"
    assert main(["status", str(tmp_path)]) == 0 and "best val/loss: 2.5000 (job 0)" in capsys.readouterr().out
    assert report([str(tmp_path)]) is None


def test_path_with_odd_characters_is_one_override():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for path in ("/a/b c", "/it's", "/a=b,c", "/{x}", "/ünï", "/back\\slash", "/end\\", "/both\\'", "/[0]", "/$HOME"):
        (parsed,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={quoted(path)}"])
        assert parsed.value() == path


def test_sweep_is_run_by_one_process_and_not_while_a_job_of_it_still_runs(tmp_path):
    (tmp_path / "3").mkdir()
    job = take(tmp_path / "3")
    assert claims.is_taken(tmp_path / "3")
    with pytest.raises(ConfigError, match=r"is still running \(job 3\)"):
        claims.take_sweep(tmp_path)
    assert not claims.is_taken(tmp_path)
    os.close(job)
    sweep = claims.take_sweep(tmp_path)
    with pytest.raises(ConfigError, match="is still running"):
        claims.take_sweep(tmp_path)
    os.close(sweep)


def test_resumed_sweep_is_reported(tmp_path, capsys):
    (sweep := tmp_path / "sweep").mkdir()
    plan = json.loads((sweep_folder.ablation(sweep) / "plan.json").read_text())
    assert main(["resume", str(sweep)]) == 0
    assert {"index.html", "report.md", "verdict.json", "runs.csv"} <= {f.name for f in (sweep / "report").iterdir()}
    assert str(sweep / "report" / "index.html") in capsys.readouterr().out.replace("\n", "")
    for key, value in (("tries", {"optimizer.lr": 0}), ("tries", {"lr": 1e308}), ("lr", 1e308)):  # without octaves
        (first, *others) = plan["jobs"]
        write_json(sweep / plans.PLAN, {**plan, "jobs": [{**first, key: value}, *others]})
        with pytest.raises(ConfigError, match=key):
            main(["resume", str(sweep)])


def test_resumed_sweep_without_any_figure_is_not_reported(tmp_path):
    sweep_folder.ablation(tmp_path)
    for job in (folder for folder in tmp_path.iterdir() if folder.is_dir()):
        Result("failed", reason="no").write(job)
    assert main(["resume", str(tmp_path)]) == 1 and not (tmp_path / "report").exists()


@pytest.mark.slow
def test_resumed_ladder_is_reported_though_a_loss_is_a_huge_integer(tmp_path):
    ladder = ladder_folder.write(tmp_path / "ladder", {"plain": (1, 1), "changed": (1.1, 1.1)})
    ladder_folder.finish(ladder, 14, 10**30)
    assert main(["resume", str(ladder)]) == 0 and (ladder / "report" / "verdict.json").is_file()
