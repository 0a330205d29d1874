"""Sweeps: one job each, one table, failures as rows; and with several processes a job, each job its own processes."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from warm import Running, Warm

from blockwright.lab.sweep import plan as plans
from blockwright.registry import user_conf

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.xdist_group("programs")
CALLBACKS = """
import json
import os

import lightning as L


class Witness(L.Callback):
    '''Every process of every job leaves a line: who it is, and what it trains.'''

    def on_train_start(self, trainer, task):
        told = {
            "pid": os.getpid(), "parent": os.getppid(), "rank": trainer.global_rank, "world": trainer.world_size,
            "lr": task.configured.recipe.lr, "attention": task.model_config["attention"]["name"],
            "folder": trainer.default_root_dir,
        }
        with open(os.environ["WITNESS"], "a") as file:
            file.write(json.dumps(told) + "\\n")


class Crash(L.Callback):
    '''Fails in the middle of training, where heads of keys are fewer than of queries.'''

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if batch_idx == 1 and task.model_config["attention"]["name"] == "gqa":
            raise RuntimeError("the queries fell off their keys")
"""


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results_of(job: Path) -> dict[str, Any]:
    return json.loads((job / "results.json").read_text())


def jobs_of(sweep: Path) -> list[str]:
    return sorted(p.name for p in sweep.iterdir() if p.is_dir())


@pytest.fixture
def callbacks(tmp_path: Path) -> dict[str, str]:
    """Environment in which the callbacks above can be imported, and the witnesses' file."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "own_callbacks.py").write_text(CALLBACKS)
    return {"PYTHONPATH": str(tmp_path / "callbacks"), "WITNESS": str(tmp_path / "witness")}


@pytest.fixture(scope="module")
def tiny_run(small: list[str]) -> list[str]:
    quick = ["callbacks.report.sample_tokens=0", "callbacks.throughput=null", "logger=none"]
    return [*small, *quick, "trainer.max_steps=4", "trainer.val_check_interval=4"]


@pytest.fixture(scope="module")
def swept(
    warm: Warm, environment: dict[str, str], tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A sweep in the folder that the configuration says, and what it said."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "own_callbacks.py").write_text(CALLBACKS)
    grid = ["model/attention=mha,gqa", "model.attention.n_heads=7,8", "+callbacks.crash._target_=own_callbacks.Crash"]
    short = ["trainer.max_steps=3", "trainer.val_check_interval=3"]
    there = {**environment, "PYTHONPATH": str(folder)}
    done = warm.run(str(ROOT / "train.py"), "-m", *tiny_run, *short, *grid, cwd=folder, env=there)
    assert done.returncode == 0, done.stderr[-3000:]
    (sweep,) = (folder / "logs" / "train" / "multiruns").iterdir()
    return sweep, done


def test_sweep_is_one_job_each_and_one_table(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    sweep, done = swept
    assert jobs_of(sweep) == ["0", "1", "2", "3"]
    rows = rows_of(sweep)
    assert [row["job"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["overrides"] for row in rows] == [
        f"model/attention={name} model.attention.n_heads={heads}" for name in ("mha", "gqa") for heads in (7, 8)
    ]
    assert [row["status"] for row in rows] == ["failed", "completed", "failed", "failed"]

    for row, job in zip(rows, jobs_of(sweep), strict=True):
        results = results_of(sweep / job)
        if row["status"] == "completed":
            assert float(row["val/loss"]) == results["metrics"]["val/loss"]
            assert float(row["val/bits_per_byte"]) == results["metrics"]["val/bits_per_byte"]
            assert int(row["parameters"]) == results["parameters"] and row["reason"] == ""
        else:
            assert row["val/loss"] == "" and row["reason"] == results["reason"]
    assert "model.attention.n_heads = 7: must divide d_model (64)" in rows[0]["reason"]
    assert rows[3]["reason"] == "RuntimeError: the queries fell off their keys"
    assert "Traceback" not in done.stderr

    said = done.stdout.partition("4 jobs")[2]
    assert "the queries fell off" in said and "model/attention=gqa" in said
    assert (sweep / "1" / "checkpoints" / "last.ckpt").is_file()
    assert not (sweep / "0" / "checkpoints").exists()


OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.direction=minimize", "hydra.sweeper.n_jobs=1"]


@pytest.mark.slow
def test_diverged_or_failed_trial_does_not_end_a_search(train_py: Command, tiny_run: list[str], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    grid = ["hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=4"]  # so that every pair is surely tried
    space = ["optimizer.lr=choice(0.001,1e30)", "model.attention.n_heads=choice(8,7)"]
    done = train_py("-m", *tiny_run, *OPTUNA, *grid, *space, f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr

    rows = rows_of(tmp_path / "sweep")
    outcome = {row["overrides"]: (row["status"], row["val/loss"]) for row in rows}
    assert len(rows) == len(outcome) == 4
    assert outcome.pop("optimizer.lr=1e+30 model.attention.n_heads=8") == ("completed", "nan")
    good = outcome.pop("optimizer.lr=0.001 model.attention.n_heads=8")
    assert good[0] == "completed" and 0 < float(good[1]) < 6
    assert set(outcome.values()) == {("failed", "")}
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_params"] == {"optimizer.lr": 0.001, "model.attention.n_heads": 8}
    assert best["best_value"] == float(good[1])


def assert_each_job_had_its_own_processes(witness: Path, sweep: Path, launchers: int = 1) -> list[dict[str, Any]]:
    """Per job: two ranks, in two processes, that trained the same; the second started for this job and by the first."""
    told = [json.loads(line) for line in witness.read_text().splitlines()]
    assert jobs_of(sweep) == ["0", "1"] and len(told) == 4
    assert [row["status"] for row in rows_of(sweep)] == ["completed"] * 2
    for job in jobs_of(sweep):
        first, second = sorted((t for t in told if t["folder"] == str(sweep / job)), key=lambda t: t["rank"])
        assert (first["rank"], second["rank"], first["world"], second["world"]) == (0, 1, 2, 2)
        assert second["parent"] == first["pid"] != second["pid"]
        assert (first["lr"], first["attention"]) == (second["lr"], second["attention"])
        written = yaml.safe_load((sweep / job / ".hydra" / "overrides.yaml").read_text())
        assert f"optimizer.lr={first['lr']}" in written and f"model/attention={first['attention']}" in written
    assert [len({t["pid"] for t in told if t["rank"] == rank}) for rank in (0, 1)] == [launchers, 2]
    return told


WITNESS, CRASH = (f"+callbacks.{name.lower()}._target_=own_callbacks.{name}" for name in ("Witness", "Crash"))


@pytest.mark.slow
def test_searching_with_two_processes_a_job_trains_each_trial_once(
    train_py: Command, tiny_run: list[str], callbacks: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    # The file, not -m, says that this is a sweep: each child reads that file too.
    search = ["hparams_search=optuna", "hydra.sweeper.n_trials=2", "optimized_metric=train/loss", "trainer=ddp_sim"]
    done = train_py(*tiny_run, *search, WITNESS, "task_name=search", f"paths.log_dir={tmp_path}", **callbacks)
    assert done.returncode == 0, done.stderr[-3000:]
    (sweep,) = (tmp_path / "search" / "multiruns").iterdir()
    told = assert_each_job_had_its_own_processes(tmp_path / "witness", sweep)
    assert len({t["lr"] for t in told}) == 2
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(results_of(sweep / job)["metrics"]["train/loss"] for job in jobs_of(sweep))


@pytest.mark.slow
def test_sweeping_with_two_processes_a_job_and_two_jobs_at_a_time_trains_each_once(
    train_py: Command, tiny_run: list[str], callbacks: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    two = [
        "trainer=[fsdp,sim]",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]
    done = train_py("-m", *tiny_run, "model/attention=mha,gqa", "optimizer.lr=0.001", *two, WITNESS, **callbacks)
    assert done.returncode == 0, done.stderr[-3000:]
    told = assert_each_job_had_its_own_processes(tmp_path / "witness", tmp_path / "sweep", launchers=2)
    assert len({t["attention"] for t in told}) == 2


@pytest.mark.slow
def test_sweep_outlives_a_job_whose_processes_crash(
    train_py: Command, tiny_run: list[str], callbacks: dict[str, str], tmp_path: Path
) -> None:
    grid = ["model/attention=gqa,mha", "trainer=ddp_sim", CRASH, f"hydra.sweep.dir={tmp_path}/sweep"]
    done = train_py("-m", *tiny_run, *grid, **callbacks)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [(row["status"], row["reason"]) for row in rows_of(tmp_path / "sweep")]
    assert rows == [("failed", "RuntimeError: the queries fell off their keys"), ("completed", "")]


def test_children_are_told_to_run_one_job_and_not_the_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from blockwright import registry
    from blockwright.training.configuration.conf import CONF
    from blockwright.training.entry.ranks import pin_children
    from blockwright.training.jobs import MODULE

    registry.load()
    given = ["experiment=attention_ablation", "model/attention=gqa", "hydra.searchpath=[file:///x]", "seed=3"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        HydraConfig.instance().set_config(compose("config", overrides=given, return_hydra_config=True))
    monkeypatch.setenv(user_conf.VARIABLE, "here")  # by --config-dir
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "-cn=config", "model/attention=gqa,mha"])
    launcher = importlib.import_module("json.tool")  # stands for joblib's worker, which a job finds as its main module
    monkeypatch.setitem(sys.modules, "__main__", launcher)
    monkeypatch.setattr(launcher, "__spec__", launcher.__spec__)
    command = pin_children(tmp_path)  # also the printed one that trains on
    assert command[:4] == ["--config-dir", "here", "-cn=config", "hydra.searchpath=[file:///x]"]
    assert command[4:] == [o for o in given if not o.startswith("hydra.")]
    assert launcher.__spec__.name == MODULE  # which Lightning's launcher runs again for the other ranks
    assert sys.argv[1:4] == ["--config-dir", "here", "-cn=config"]
    assert "hydra.mode=RUN" in sys.argv and "hydra.searchpath=[file:///x]" in sys.argv
    assert "-m" not in sys.argv and "model/attention=gqa,mha" not in sys.argv
    assert HydraConfig.get().run.dir == str(tmp_path)


# Sweeps that are killed

Start = Callable[..., Running]


@pytest.fixture
def start(warm: Warm, environment: dict[str, str], tmp_path: Path) -> Start:
    """``blockwright train -m ARGUMENTS`` in a process group of its own, which is running when this returns."""

    def call(*arguments: str) -> Running:
        return warm.start(str(ROOT / "train.py"), "-m", *arguments, cwd=tmp_path, env=environment, merge=True)

    return call


@pytest.fixture
def lab_sweep(warm: Warm, environment: dict[str, str], tmp_path: Path) -> Command:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        there = {**environment, "PYTHONPATH": str(ROOT)}
        return warm.run("-m", "blockwright.lab.sweep", *arguments, cwd=tmp_path, env=there, timeout=900)

    return call


def until_saved(job: Path, process: Running) -> None:
    """Wait till a job is in the middle of training, its checkpoint written."""
    end = time.monotonic() + 900
    while not (job / "checkpoints" / "last.ckpt").exists() or (job / "results.json").exists():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(kill(process)[-3000:])
        time.sleep(0.01)


def kill(process: Running) -> str:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[0]
    until = time.monotonic() + 30
    with suppress(ProcessLookupError):  # a launcher's workers hold locks until they too are gone
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    return said


def told(sweep: Path) -> list[tuple[int, str, float | None, dict[str, Any]]]:
    """What the study of a search knows of its trials."""
    from blockwright.lab.sweep.study import open_study

    return [(t.number, t.state.name, t.value, t.params) for t in open_study(sweep, plans.read(sweep)).trials]


SAVING = ["callbacks.interruption.every_n_steps=1", "trainer.val_check_interval=null"]


@pytest.mark.slow
def test_killed_search_resumes_with_no_trial_lost_or_repeated(
    start: Start, lab_sweep: Command, tiny_run: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    sweep = tmp_path / "sweep"
    search = ["hparams_search=pruning", "hydra.sweeper.n_trials=4", f"hydra.sweep.dir={sweep}"]
    process = start(*tiny_run, *SAVING, *search)
    until_saved(sweep / "2", process)
    first = kill(process)
    assert first.count("jobs: ") == 0
    before, finished = told(sweep), results_of(sweep / "1")
    assert [state for _, state, *_ in before] == ["COMPLETE", "COMPLETE", "RUNNING"]

    done = lab_sweep("resume", str(sweep))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" jobs: ") == 1 and "4 jobs: " in done.stdout
    after = told(sweep)
    assert after[:2] == before[:2] and after[2][3] == before[2][3]
    assert [(number, state) for number, state, *_ in after] == [(i, "COMPLETE") for i in range(4)]
    assert [value for _, _, value, _ in after] == [results_of(sweep / str(i))["metrics"]["val/loss"] for i in range(4)]
    assert results_of(sweep / "1") == finished
    assert [row["job"] for row in rows_of(sweep)] == ["0", "1", "2", "3"]
    went_on = yaml.safe_load((sweep / "2" / ".hydra" / "overrides.yaml").read_text())
    assert any(o.startswith("ckpt_path=") for o in went_on)
    assert not any("ckpt_path" in row["overrides"] for row in rows_of(sweep))


EXAMPLES = {
    "seeds": ["hydra.sweeper.params={seed: 'range(3,4)'}"],
    "learning_rates": ["hydra.sweeper.params={optimizer.lr: '0.01', model/attention: gqa}"],
}


def test_every_example_of_a_search_is_run_here() -> None:
    others = {"optuna", "optuna_joblib", "pruning"}  # in the other tests of this file
    assert {*EXAMPLES, *others} == {file.stem for file in (ROOT / "conf" / "hparams_search").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_a_search_runs(name: str, train_py: Command, tiny_run: list[str], tmp_path: Path) -> None:
    short = ["trainer.max_steps=2", "trainer.val_check_interval=1", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = train_py(*tiny_run, *short, f"hparams_search={name}", *EXAMPLES[name])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["status"] for row in rows_of(tmp_path / "sweep")] == ["completed"]


@pytest.mark.slow
def test_killed_search_by_several_workers_is_the_one_that_never_stopped(
    start: Start, lab_sweep: Command, tiny_run: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    search = ["hparams_search=optuna_joblib", "hydra.sweeper.n_trials=3"]
    sweep, whole = tmp_path / "sweep", tmp_path / "whole"
    process = start(*tiny_run, *SAVING, *search, f"hydra.sweep.dir={sweep}")
    until_saved(sweep / "2", process)
    kill(process)
    done = lab_sweep("resume", str(sweep))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" jobs: ") == 1
    assert len(rows_of(sweep)) == 3

    alone = "hydra.launcher.n_jobs=1"  # one after the other, in no worker that imports; still drawn two at a time
    process = start(*tiny_run, *SAVING, *search, alone, f"hydra.sweep.dir={whole}")
    process.communicate()
    assert told(sweep) == told(whole)
