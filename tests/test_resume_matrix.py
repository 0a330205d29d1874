"""Every way to train, and every way to stop: resumed it is the run that never stopped, or one message.

In no case is a checkpoint written over that is not the run's own: the folder in which the runs keep theirs holds those
of another run from the beginning.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pairwise import each
from warm import Warm

from blockwright.lab.sweep import plan as plans
from blockwright.training.checkpoints.atomic import write_file

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

CALLBACK = """
import os
from pathlib import Path

import lightning as L


class Once(L.Callback):
    '''Sends its process a signal at a step, but not again.'''

    observes = "sends signals"

    def __init__(self, signum: int, marker: str):
        self.signum, self.marker = signum, Path(marker)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if trainer.global_step == 2 and self.signum and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), self.signum)
"""


class Door(NamedTuple):
    """A way to train: its command, the folders of its runs, and the command that resumes."""

    start: Callable[[Path, list[str]], list[str]]
    runs: tuple[str, ...]  # below the folder of the story
    resume: Callable[[Path, list[str]], list[str]]


TRAIN = [str(ROOT / "train.py")]
LAB_SWEEP = ["-m", "blockwright.lab.sweep", "resume"]


def sweep_of(*given: str) -> Callable[[Path, list[str]], list[str]]:
    return lambda folder, base: [*TRAIN, "-m", *base, *given, f"hydra.sweep.dir={folder}/sweep"]


def resume_sweep(folder: Path, base: list[str]) -> list[str]:
    return [*LAB_SWEEP, f"{folder}/sweep"]


def cli_last(folder: Path) -> Path:
    return max(folder.glob("kept/**/last.ckpt"), key=lambda path: path.stat().st_mtime)


RATES = "optimizer.lr=0.01,0.02"
SEARCH = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
DOORS = {
    "single run": Door(
        lambda folder, base: [*TRAIN, *base, f"hydra.run.dir={folder}/run"],
        ("run",),
        lambda folder, base: [*TRAIN, *base, f"hydra.run.dir={folder}/run", "auto_resume=true"],
    ),
    "grid": Door(sweep_of(RATES, "auto_resume=true"), ("sweep/0", "sweep/1"), resume_sweep),
    "search": Door(sweep_of(*SEARCH, "optimizer.lr=choice(0.01,0.02)"), ("sweep/0", "sweep/1"), resume_sweep),
    "ablation": Door(resume_sweep, ("sweep/0", "sweep/1"), resume_sweep),
    "cli": Door(
        lambda folder, base: [*TRAIN, "fit", "--compose", *base],
        (),
        lambda folder, base: [*TRAIN, "fit", "--compose", *base, f"--ckpt_path={cli_last(folder)}"],
    ),
}
STOPS = {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "finished": 0}


@pytest.fixture(scope="module")
def call(warm: Warm, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    modules = tmp_path_factory.mktemp("modules")
    (modules / "stop_once.py").write_text(CALLBACK)

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        there = {**environment, "PYTHONPATH": f"{ROOT}:{modules}"}
        return warm.run(*command, cwd=folder, env=there, timeout=900)

    return run


def base_of(small: list[str], folder: Path, signum: int) -> list[str]:
    once = {"_target_": "stop_once.Once", "signum": int(signum), "marker": str(folder / "stopped")}
    saving = ["callbacks.interruption.every_n_steps=1", f"callbacks.checkpoint.dirpath={folder}/kept"]
    quick = ["logger=csv", "callbacks.report.sample_tokens=0", f"paths.log_dir={folder}/logs", "trainer.max_steps=4"]
    return [*small, *quick, *saving, f"+callbacks.once={json.dumps(once)}".replace('"', "")]


def begin(door: str, folder: Path, base: list[str]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    if door == "ablation":
        rates = [("a", 0.01), ("b", 0.02)]
        jobs = [
            {"job": i, "arm": arm, "seed": 0, "overrides": [*base, f"optimizer.lr={rate}"]}
            for i, (arm, rate) in enumerate(rates)
        ]
        head = {"kind": "ablation", "name": "x", "command": "c", "metric": "val/loss", "direction": "minimize"}
        plans.write(folder / "sweep", {**head, "workers": 1, "cwd": str(folder), "jobs": jobs})
    return DOORS[door].start(folder, base)


def weights(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)["state_dict"]


def rate(file: Path) -> str:
    """Learning rate of a run: a search draws the order of its trials."""
    return str(torch.load(file, weights_only=True)["configuration"]["optimizer"]["lr"])


def lasts(door: str, folder: Path) -> list[Path]:
    return [folder / run / "checkpoints" / "last.ckpt" for run in DOORS[door].runs] or [cli_last(folder)]


@pytest.fixture(scope="module")
def whole(small: list[str], call: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of each run that never stopped."""
    found: dict[str, Any] = {}
    for rate in (0.01, 0.02):
        folder = tmp_path_factory.mktemp("whole")
        base = [*base_of(small, folder, 0), f"optimizer.lr={rate}", f"hydra.run.dir={folder}/run"]
        done = call([*TRAIN, *base], folder)
        assert done.returncode == 0, done.stderr
        found[str(rate)] = weights(folder / "kept" / "last.ckpt")
    return found


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(("door", "stop"), each(list(DOORS), list(STOPS)))
def test_resumed_it_is_the_run_that_never_stopped(
    door: str, stop: str, small: list[str], call: Callable[..., Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "story"
    base = base_of(small, folder, STOPS[stop])
    # A folder that holds another run's checkpoints: refused, or a folder of its own in it.
    if alone := door in ("single run", "cli"):
        elsewhere = tmp_path / "elsewhere"
        foreign = elsewhere / "kept" / "last.ckpt"
        other = write_file_of_another_run(foreign)
        refused = call(DOORS[door].start(elsewhere, base_of(small, elsewhere, 0)), elsewhere)
        assert refused.returncode == 64 and "holds last.ckpt of another run" in refused.stderr, refused.stderr[-2000:]
    else:
        foreign = folder / "kept" / "last.ckpt"
        other = write_file_of_another_run(foreign)

    command = begin(door, folder, base)
    stopped = call(command, folder)
    assert stopped.returncode in ({-9, 0, 75} if stop == "kill" else {75, 0}), stopped.stderr[-2000:]
    if not alone and door != "ablation":  # with a changed configuration: a message, and nothing is touched
        before = {file: digest(file) for file in folder.glob("**/last.ckpt") if not file.is_symlink()}
        said = call([*command, "seed=1"], folder)
        assert said.returncode == 64 and said.stderr.count("error: ") == 1, said.stdout[-2000:] + said.stderr[-2000:]
        assert "Traceback" not in said.stderr and {file: digest(file) for file in before} == before

    resume = DOORS[door].resume(folder, base)
    if (door, stop) == ("ablation", "kill"):  # its runner lives on, and the job that was killed has failed
        resume = ["retry" if word == "resume" else word for word in resume]
    done = call(resume, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for file in lasts(door, folder):
        ours, theirs = weights(file), whole[rate(file)]
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [], file
    assert digest(foreign) == other
    if door == "single run":
        header, *rows = (line.split(",") for line in (folder / "run" / "csv" / "metrics.csv").read_text().splitlines())
        column, step = header.index("train/loss"), header.index("step")
        trained = [int(row[step]) for row in rows if row[column]]
        assert trained == sorted(set(trained)) and len(trained) == 4, trained


def write_file_of_another_run(file: Path) -> str:
    write_file({"of": "another run"}, file)
    return digest(file)
