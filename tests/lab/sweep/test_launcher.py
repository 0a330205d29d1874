"""Plans on launchers of Hydra: the words that choose one, the rounds, and what kill, stop and failure leave."""

import json
import signal
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from stand_in import make_plan, statuses, until
from warm import Running

from blockwright.lab.ablation import __main__ as ablate
from blockwright.lab.sweep import callback, launcher, runner, seams
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.__main__ import main
from blockwright.lab.sweep.launcher import Rounds
from blockwright.registry import REFUSED, ConfigError
from blockwright.registry.command import run_command, sort_words
from blockwright.training import claims
from blockwright.training.result import Result, record_failure

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


class Launcher:
    """Runs jobs at once, and remembers what it was given."""

    def __init__(self, sweep):
        self.sweep = sweep
        self.launched = []

    def launch(self, job_overrides, initial_job_idx):
        given = {int(one[-1].removeprefix("hydra.sweep.subdir=")): one[:-1] for one in job_overrides}
        self.launched.append(given)
        return [self._run(number, dict(o.split("=", 1) for o in one)) for number, one in given.items()]

    def _run(self, number, given):
        folder = self.sweep / str(number)
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        (folder / ".hydra" / "overrides.yaml").touch()
        returned = JobReturn(overrides=[], status=JobStatus.COMPLETED)
        returned.return_value = 0.0
        if given["do"] == "ok":
            Result("completed", metrics={"val/loss": float(given["loss"])}).write(folder)
        elif given["do"] == "fail":
            record_failure(folder, "it broke")
        elif given["do"] == "error":
            returned.status, returned.return_value = JobStatus.FAILED, RuntimeError("outside the run")
        return returned


def composing(config, overrides):
    if "do=misspelt" in overrides:
        raise ValueError("there is no such key")


@pytest.fixture
def rounds(tmp_path, monkeypatch):
    """Those of the folder ``sweep``, on the launcher above."""
    sweep = tmp_path / "sweep"
    monkeypatch.setattr(Plugins.instance(), "instantiate_launcher", lambda **_: Launcher(sweep))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}})
    context = SimpleNamespace(config_loader=SimpleNamespace(load_sweep_config=composing))
    return Rounds(config, context, lambda _: None)


def numbers(rounds):
    return [list(each) for each in rounds.launcher.launched]


def planned(sweep, *jobs, after=None, **more):
    make_plan(sweep, *jobs, **more)
    plan = plans.read(sweep)
    for number, start in (after or {}).items():
        plan["jobs"][number]["after"] = start
    plans.write(sweep, plan)


def test_jobs_that_start_from_others_are_in_later_rounds(rounds):
    planned(rounds.sweep, *["do=ok loss=1"] * 5, after={1: 0, 2: 4, 3: 2})
    rounds.run()
    assert numbers(rounds) == [[0, 4], [1, 2], [3]]
    assert f"init_from={rounds.sweep}/4" in rounds.launcher.launched[1][2]
    assert "auto_resume=false" in rounds.launcher.launched[0][0]
    assert statuses(rounds.sweep) == ["completed"] * 5


def test_failing_jobs_are_rows_and_so_are_those_that_start_from_them(rounds):
    jobs = ["do=fail", "do=ok loss=1", "do=ok loss=1", "do=error", "do=misspelt", "do=ok loss=2"]
    planned(rounds.sweep, *jobs, after={1: 0, 2: 1})
    rounds.run()
    assert numbers(rounds) == [[0, 3, 5]]  # one that cannot be composed would end the launcher
    assert statuses(rounds.sweep) == [*["failed"] * 5, "completed"]
    reasons = [Result.read(rounds.sweep / str(n)).reason for n in range(5)]
    assert reasons[1].startswith("job 0, whose weights") and reasons[2].startswith("job 1, whose weights")
    assert reasons[3] == "RuntimeError: outside the run" and reasons[4] == "ValueError: there is no such key"


def test_only_what_has_not_ended_runs_from_its_own_checkpoint(rounds):
    from blockwright.training.checkpoints.atomic import write_file

    planned(rounds.sweep, *["do=ok loss=1"] * 4)
    Result("completed", metrics={"val/loss": 3.0}).write(rounds.sweep / "0")
    record_failure(rounds.sweep / "2", "it broke")
    write_file({"a": 1}, rounds.sweep / "3" / "checkpoints" / "last.ckpt")
    rounds.run()
    (given,) = rounds.launcher.launched
    assert list(given) == [1, 3] and f"ckpt_path={rounds.sweep}/3/checkpoints/last.ckpt" in given[3]
    assert not any(o.startswith("ckpt_path") for o in given[1])


def test_chosen_jobs_alone_run_and_time_is_recorded(rounds, monkeypatch):
    monkeypatch.setattr("blockwright.lab.sweep.plan.grow", lambda *_: pytest.fail("it grew"))
    planned(rounds.sweep, *["do=ok loss=1"] * 3, after={2: 0})
    rounds.run([1, 2])
    assert numbers(rounds) == [[1]] and statuses(rounds.sweep) == ["unfinished", "completed", "unfinished"]
    assert Result.read(rounds.sweep / "1").wall_seconds is not None


def test_plan_grows_on_a_launcher(rounds, monkeypatch):
    def halved(directory, plan):
        values = [Result.read(directory / str(job["job"])).value("val/loss") or 9.0 for job in plan["jobs"]]
        more = {"job": len(values), "overrides": ["do=ok", f"loss={min(values) / 2}"]}
        return [] if min(values) <= 1 else [more]

    monkeypatch.setattr(seams, "following", halved)
    planned(rounds.sweep, "do=ok loss=4", "do=fail")
    rounds.run()
    assert numbers(rounds) == [[0, 1], [2], [3]]
    assert [job["overrides"][-1] for job in plans.read(rounds.sweep)["jobs"]][2:] == ["loss=2.0", "loss=1.0"]


def taken(*given):
    return launcher.take(sort_words(given, ("launcher", "workers", "seeds")))


@pytest.mark.slow
def test_plan_keeps_the_launcher_and_how_many_jobs_it_runs():
    words, plan = taken("seeds=3", "launcher=joblib", "hydra.launcher.n_jobs=2", "data=text")
    assert plan == {"launcher": JOBLIB} and words.overrides == ["data=text"]
    assert words.settings == {"seeds": "3", "workers": "2"}
    assert taken("seeds=3", "workers=2")[1] == {}
    hosted = taken("launcher=kubernetes", "hydra.launcher.parallel=3", "hydra.launcher.namespace=a")
    assert hosted[0].settings["workers"] == "3" and hosted[1]["cluster"]["namespace"] == "a"


MISTAKES = {
    "no such launcher": (["launcher=jobbib"], "launcher", "joblib"),
    "a list of them": (["launcher=basic,joblib"], "launcher", "basic"),
    "no name": (["launcher="], "launcher", "joblib"),
    "options of none": (["hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs", "launcher="),
    "no such option": (["launcher=joblib", "hydra.launcher.n_job=2"], "hydra.launcher.n_job", ""),
    "no jobs": (["launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs", "1 or more"),
    "no number": (["launcher=joblib", "hydra.launcher.n_jobs=x"], "hydra.launcher.n_jobs", "integer"),
    "a class": (["launcher=joblib", "hydra.launcher._target_=os.system"], "hydra.launcher._target_", "Leave"),
    "workers": (["launcher=joblib", "workers=2"], "workers", "n_jobs"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_refused_before_anything_is_written(case, tmp_path, capsys):
    given, path, remedy = MISTAKES[case]
    with pytest.raises(ConfigError) as refused:
        taken(*given)
    assert refused.value.path == path and remedy in refused.value.remedy
    if case == "no such launcher":
        assert run_command(ablate.main, ["balance_losses", *given, f"paths.log_dir={tmp_path}"]) == REFUSED
        assert capsys.readouterr().err.startswith(f"error: {path} =")
    assert not list(tmp_path.iterdir())


def test_sweeper_and_workers_without_a_plan_for_them_are_refused(tmp_path):
    config = OmegaConf.create(
        {"hydra": {"sweeper": {"_target_": callback.PLAN_SWEEPER}, "overrides": {"hydra": [], "task": []}}}
    )
    with pytest.raises(ConfigError, match="launcher=NAME"):
        callback.begin(tmp_path, config, [])
    assert not list(tmp_path.iterdir())
    planned(tmp_path / "sweep", "do=ok loss=1", launcher=JOBLIB)
    with pytest.raises(ConfigError, match="--workers"):
        main(["resume", str(tmp_path / "sweep"), "--workers", "2"])


# --- real launchers

STAND_IN = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
given = {"argv": sys.argv[1:], "cwd": os.getcwd(), "resumed": os.environ.get("BLOCKWRIGHT_RESUMED_SWEEP")}
with open("calls", "w") as file:
    print(json.dumps(given), file=file)
while os.path.exists("slow"):
    time.sleep(0.02)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.mark.parametrize("code", [0, 1, 64, 75])
def test_multirun_gets_the_plan_and_its_exit_code_counts(code, tmp_path, monkeypatch):
    (file := tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr("blockwright.training.jobs.TRAIN", (str(file),))
    monkeypatch.setenv("CODE", str(code))
    sweep, began = tmp_path / "sweep", tmp_path / "began"
    began.mkdir()
    planned(sweep, "do=ok loss=1", launcher=JOBLIB, flags=["--config-dir", "x"], cwd=str(began))
    assert runner.run_plan(sweep, jobs=[0, 3]) == code
    call = json.loads((began / "calls").read_text())
    assert call["cwd"] == str(began) and call["resumed"] == str(sweep)
    assert call["argv"][:5] == ["--config-dir", "x", "hydra/sweeper=plan", *JOBLIB]
    assert {"hydra.sweeper.jobs=[0,3]", f"hydra.sweep.dir={sweep}", "hydra.mode=MULTIRUN"} <= set(call["argv"])


Start = Callable[..., Running]


@pytest.fixture
def start(warm, environment, small, tmp_path):
    """Runs a plan of small jobs as ``launcher.run`` does, forked from a process that has the imports."""
    quick = ["callbacks.report.sample_tokens=0", "logger=none", "callbacks.throughput=null"]

    def call(sweep, jobs=(), name="basic"):
        chosen = [f"hydra/launcher={name}"]
        if jobs:
            listed = [{**job, "job": i, "overrides": [*small, *quick, *job["overrides"]]} for i, job in enumerate(jobs)]
            plan = {"kind": "grid", "name": "x", "metric": "val/loss", "direction": "minimize", "workers": 1}
            plans.write(sweep, {**plan, "launcher": chosen, "jobs": listed})
        own = ["hydra/sweeper=plan", *chosen, f"hydra.sweep.dir={sweep}", "hydra.mode=MULTIRUN"]
        variables = {**environment, plans.RESUMED: str(sweep)}
        return warm.start("-m", "blockwright.train", *own, cwd=tmp_path, env=variables)

    return call


@pytest.mark.slow
def test_real_jobs_are_resumed_after_a_kill_in_their_own_folders(start, tmp_path):
    from blockwright.training.checkpoints.find import newest

    long = ["trainer.max_steps=40", "callbacks.interruption.every_n_steps=5"]
    jobs = [
        {"overrides": ["model.attention.n_heads=7"]},  # does not divide the width
        {"overrides": ["optimizer.lr=0.001"]},
        {"overrides": [*long, "seed=1"]},
        {"overrides": [], "after": 2},
        {"overrides": ["model.no_such=1"]},
    ]
    sweep = tmp_path / "sweep"
    process = start(sweep, jobs)
    until(lambda: newest(sweep / "2") is not None, 100)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert statuses(sweep)[:3] == ["failed", "completed", "unfinished"]
    assert claims.holder(sweep) is None
    before = Result.read(sweep / "1")
    process = start(sweep)
    said, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    assert statuses(sweep) == ["failed", "completed", "completed", "completed", "failed"]
    assert Result.read(sweep / "1") == before and (before.wall_seconds is None or before.wall_seconds > 0)
    assert "training from step 0 of 40" not in said and "Traceback" not in error
    assert "must divide" in Result.read(sweep / "0").reason
    assert f"init_from={sweep}/2" in plans.overrides_of(sweep / "3")


TINY = [
    "model=tiny", "model.n_layers=1", "model.d_model=16", "model/ffn=swiglu", "model.layout.ffn=ffn*",
    "model/attention=mha", "model.attention.n_heads=2", "data=sorting", "test=false", "logger=none",
    "callbacks.report.sample_tokens=0", "trainer.max_steps=10", "trainer.val_check_interval=5",
]  # fmt: skip


@pytest.mark.slow
def test_growing_ablation_on_joblib_that_is_stopped_is_that_of_processes(tmp_path, environment, warm, forked_jobs):
    written = {"base": TINY, "baseline": "a", "arms": {"a": [], "b": "model/ffn=gelu"}, "see": 5, "pairs": 2}
    (file := tmp_path / "mine.yaml").write_text(json.dumps({**written, "tune": None}))
    ended = {}
    for name, words in {"joblib": ["launcher=joblib", JOBLIB[1]], "processes": ["workers=2"]}.items():
        logs = tmp_path / name
        given = [str(file), *words, f"paths.log_dir={logs}"]
        if name == "processes":
            assert ablate.main(given) == 0
        else:
            process = warm.start("-m", "blockwright", "ablate", *given, cwd=tmp_path, env=environment)
            until(lambda logs=logs: [*logs.glob("ablation/mine/*/*/results.json")], 200)
            process.send_signal(signal.SIGTERM)
            process.communicate()
        (sweep,) = logs.glob("ablation/mine/*")
        if name == "joblib":
            assert len(plans.read(sweep)["jobs"]) == 4 and process.returncode == 75
            until(lambda sweep=sweep: not any(map(claims.is_taken, [sweep, *sweep.iterdir()])), 60)
            assert main(["resume", str(sweep)]) == 0
        plan = plans.read(sweep)
        results = {job["job"]: Result.read(sweep / str(job["job"])) for job in plan["jobs"]}
        assert any(result.wall_seconds for result in results.values())
        ended[name] = [(plans.name_of(job), results[job["job"]].value("val/loss")) for job in plan["jobs"]]
        assert len(plan["jobs"]) > 4 and None not in dict(ended[name]).values()
    assert ended["joblib"] == ended["processes"]
