"""A ladder that is killed in any rung ends with the same losses, to the digit; a decay is as a training of its own."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from blockwright.lab.ladder.design import Cell, Outline, Size, compared, schedule
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.job import command
from blockwright.training.result import Result

ROOT = Path(__file__).resolve().parents[3]
MODEL = (
    "model=tiny", "model.n_layers=1", "model.d_model=16", "model/ffn=swiglu", "model.layout.ffn=ffn*",
    "model/attention=mha", "model.attention.n_heads=2", "data=sorting", "test=false",
    "callbacks.report.sample_tokens=0", "logger=none", "trainer.val_check_interval=null",
)  # fmt: skip
SHORT, LONG = 10, 80


class Started:
    """Jobs of a plan, each forked from a process that has loaded the imports."""

    def __init__(self, sweep, warm, environment):
        self.sweep, self.warm, self.environment = sweep, warm, environment
        outline = Outline(
            "a", {"one": Size({"short": SHORT, "long": LONG}, {"a": Cell(MODEL, 1, 1)})}, 1, 0.2, 0.05, (0,)
        )
        plan = {"kind": "ladder", "name": "mine", "metric": "val/loss", "direction": "minimize"}
        plans.write(sweep, {**plan, "jobs": compared(outline, {}, 0), "ladder": outline.as_plain()})
        self.plan = plans.read(sweep)

    def start(self, number):
        arguments, _ = command(self.sweep, self.plan, self.plan["jobs"][number])
        return self.warm.start(*arguments, cwd=self.sweep, env=self.environment)

    def loss(self, number):
        return Result.read(self.sweep / str(number)).value("val/loss")


def ended(running):
    _, err = running.communicate()
    assert running.returncode == 0, err[-3000:]


@pytest.mark.slow
def test_a_killed_trunk_and_its_decay_end_as_if_nothing_had_been(warm, environment, tmp_path):
    whole, killed = (Started(tmp_path / name, warm, environment) for name in ("whole", "killed"))
    trunk = killed.start(0)
    until = time.monotonic() + 200
    kept = killed.sweep / "0" / "checkpoints" / "step_8.ckpt"
    while not kept.exists() and time.monotonic() < until:
        time.sleep(0.02)
    trunk.send_signal(signal.SIGKILL)
    trunk.communicate()
    assert killed.loss(0) is None, "it ended before it was killed"
    for one in (killed, whole):
        for number in (0, 1):
            ended(one.start(number))
    assert killed.loss(0) == whole.loss(0) is not None
    assert killed.loss(1) == whole.loss(1) is not None

    alone = [*MODEL, *schedule(SHORT, warmup=4, decay=2), "seed=0", f"hydra.run.dir={tmp_path / 'alone'}"]
    ended(warm.start("-m", "blockwright.train", *alone, cwd=tmp_path, env=environment))
    assert Result.read(tmp_path / "alone").value("val/loss") == whole.loss(1)


@pytest.mark.slow
def test_a_trunk_that_lost_its_milestone_keeps_it_when_it_resumes(warm, environment, tmp_path):
    one = Started(tmp_path / "one", warm, environment)
    for job in one.plan["jobs"]:
        job["overrides"] = [o.replace("steps:[8]", "steps:[12]") for o in job["overrides"]]
    trunk = one.start(0)
    kept = one.sweep / "0" / "checkpoints" / "step_12.ckpt"
    until = time.monotonic() + 200
    while not kept.exists() and time.monotonic() < until:
        time.sleep(0.02)
    trunk.send_signal(signal.SIGKILL)
    trunk.communicate()
    shutil.copy(kept, kept.with_name("last.ckpt"))
    kept.unlink()
    kept.with_name("last.previous.ckpt").unlink(missing_ok=True)
    ended(one.start(0))
    assert kept.exists()
