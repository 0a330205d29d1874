"""A mixture that is killed resumes as the run that was not, and one of a trillion tokens begins at once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("killed_mixture")]

ROOT = Path(__file__).resolve().parents[4]
STEPS, SECOND_STAGE, KILLED = 6, 2, 4
TWO = ["trainer=[fsdp,sim]"]

CALLBACK = """
import os
import signal
from pathlib import Path

import lightning as L
import numpy as np


class Watch(L.Callback):
    '''Writes down the batches of each process, and kills all processes at a step, unless one of them did before.'''

    observes = "writes batches down"

    def __init__(self, folder: str, killed_at: int):
        self.folder, self.killed_at = Path(folder), killed_at

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        step = trainer.global_step
        if step == self.killed_at and trainer.is_global_zero and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.killpg(os.getpgrp(), signal.SIGKILL)
        np.save(self.folder / f"{step}-{trainer.global_rank}.npy", batch["tokens"].numpy())
"""


class Story:
    """A run in a folder, which can be killed and resumed."""

    def __init__(self, folder: Path, call: Callable[..., Any]) -> None:
        self.folder, self.call = folder, call
        (folder / "seen").mkdir(parents=True)

    def train(self, *overrides: str, killed_at: int = -1) -> int:
        watch = json.dumps({"_target_": "watch.Watch", "folder": str(self.folder / "seen"), "killed_at": killed_at})
        words = [f"hydra.run.dir={self.folder}/run", "auto_resume=true", f"+callbacks.watch={watch}".replace('"', "")]
        return self.call([*words, *overrides])

    def batches(self) -> list[list[list[int]]]:
        """The rows of each step, of all ranks."""
        files = [sorted((self.folder / "seen").glob(f"{step}-*.npy")) for step in range(STEPS)]
        return [np.concatenate([np.load(file) for file in ranks]).tolist() for ranks in files]

    def figures(self) -> dict[str, list[tuple[str, str]]]:
        """Step and value, as they are written, of every figure but speeds and loads of the machine."""
        with (self.folder / "run" / "csv" / "metrics.csv").open(newline="") as table:
            rows = [*csv.DictReader(table)]
        kept = [name for name in rows[0] if name.startswith(("train/loss", "val/", "data/"))]
        return {name: [(row["step"], row[name]) for row in rows if row[name]] for name in kept}

    def weights(self) -> dict[str, torch.Tensor]:
        file = self.folder / "run" / "checkpoints" / "last.ckpt"
        return torch.load(file, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def story(small, warm, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "watch.py").write_text(CALLBACK)
    for i, name in enumerate(("code", "web")):
        formats.npy(folder / f"{name}.npy", documents(90, i))
    sources = ",".join(f"{name}:{{files:{folder}/{name}.npy,val_tokens:300}}" for name in ("code", "web"))
    stages = f"{{shares:{{web:0.75,code:0.25}},batches:{SECOND_STAGE}}},{{shares:{{web:0.25,code:0.75}}}}"
    base = [each for each in small if not each.startswith(("data", "paths", "trainer.max", "callbacks.report"))]
    base += ["data=mixture", "data/tokenizer=bytes", f"data.sources={{{sources}}}", f"data.stages=[{stages}]"]
    base += ["data.sequence_length=32", "data.batch_size=4", "data.eval_windows=4", f"trainer.max_steps={STEPS}"]
    base += ["logger=csv", "callbacks.report.sample_tokens=0", "callbacks.interruption.every_n_steps=1"]
    base += [f"paths.data_dir={folder}/data", f"paths.log_dir={folder}/logs"]

    def call(overrides: list[str]) -> int:
        paths = {**environment, "PYTHONPATH": f"{ROOT}:{folder}"}
        done = warm.run(str(ROOT / "train.py"), *base, *overrides, cwd=folder, env=paths, timeout=900)
        print(done.stdout[-3000:], done.stderr[-3000:])
        return done.returncode

    return lambda: Story(tmp_path_factory.mktemp("story"), call)


@pytest.fixture(scope="module")
def stories(story: Callable[[], Story]) -> tuple[Story, Story]:
    """The run of two processes that was not killed, and the one that was."""
    whole, killed = story(), story()
    assert whole.train(*TWO) == 0
    assert killed.train(*TWO, killed_at=KILLED) == -9
    return whole, killed


def test_a_mixture_killed_in_its_second_stage_is_the_run_that_was_not(stories, tmp_path):
    whole, killed = stories
    resumed = copy_of(killed, tmp_path)
    assert resumed.train(*TWO) == 0
    assert resumed.batches() == whole.batches() and len(whole.batches()) == STEPS
    assert resumed.figures() == whole.figures() and len(whole.figures()["train/loss"]) == STEPS
    assert {"val/code/loss", "val/web/loss", "data/code/epochs", "data/stage"} <= {*whole.figures()}
    ours, theirs = resumed.weights(), whole.weights()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_are_resumed_by_one(stories, tmp_path):
    whole, killed = stories
    resumed = copy_of(killed, tmp_path)
    assert resumed.train() == 0
    assert resumed.batches() == whole.batches()
    ours, theirs = resumed.figures(), whole.figures()
    assert ours["data/code/tokens"] == theirs["data/code/tokens"] and ours["data/stage"] == theirs["data/stage"]
    # Then one process computes what two did: products of other shapes, and gradients summed in another order.
    assert ours["train/loss"][:KILLED] == theirs["train/loss"][:KILLED]
    for (step, loss), (there, expected) in zip(ours["train/loss"], theirs["train/loss"], strict=True):
        assert step == there and float(loss) == pytest.approx(float(expected), rel=1e-5)


def copy_of(story: Story, folder: Path) -> Story:
    """What a killed run has left, to resume it more than once, without what one rank began."""
    copied = Story(folder / "copy", story.call)
    shutil.copytree(story.folder, copied.folder, dirs_exist_ok=True)
    for file in (copied.folder / "seen").glob(f"{KILLED}-*.npy"):
        file.unlink()
    return copied


LATE = """
import json, resource, sys, time
import numpy as np
from pathlib import Path
from blockwright.training.data.mixture.order import MixtureOrder
from blockwright.training.data.mixture.shards import Reading, open_shard
from blockwright.training.data.mixture.order import Schedule, Stage
from blockwright.training.data.mixture.tokens import Rings, Shards
from blockwright.training.data.mixture.tokens import MixtureWindows
from blockwright.training.data.windows import Making

before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
reading = Reading("data.sources.web.files", 256, dtype="uint16", documents="eos")
sources = {
    name: Shards([open_shard(file, reading) for file in sorted(Path(sys.argv[1]).glob(f"{name}_*.bin"))])
    for name in ("code", "web")
}
schedule = Schedule((Stage({"code": 3, "web": 7}, 1_000_000), Stage({"code": 6, "web": 4})), 256)
order = MixtureOrder(schedule, tuple(tokens.n_tokens for tokens in sources.values()), 4096, 0, 2_000_000)
_, rows = next(iter(order.batches(1_500_000, 1_500_001)))
windows = MixtureWindows(Rings(sources, 257, "{name}"), 4096, np.ones(257, np.int64), 256, Making())
batch = windows.__getitems__(rows.tolist()[:8])
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
seconds, shape = time.process_time() - began, list(batch["tokens"].shape)
print(json.dumps({"seconds": seconds, "megabytes": used / 1024, "shape": shape}))
"""


@pytest.mark.slow
def test_a_trillion_tokens(tmp_path: Path):
    for name, n in (("web", 35), ("code", 15)):
        for i in range(n):
            with (tmp_path / f"{name}_{i:02}.bin").open("wb") as file:
                os.truncate(file.fileno(), 2 * 20 * 10**9)
    done = subprocess.run([sys.executable, "-c", LATE, str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["shape"] == [8, 4096]
    assert measured["seconds"] < 2 and measured["megabytes"] < 200
