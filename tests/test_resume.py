"""Stopped by a signal, a run leaves a checkpoint; resumed, it is the run that never stopped."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from programs import Outcome, run_all
from warm import Warm

pytestmark = pytest.mark.xdist_group("programs")  # its fixtures run whole programs, once

ROOT = Path(__file__).resolve().parent.parent
BIAS = "model/gating=sigmoid_bias"
QUICK = "balancing bias"  # which is stopped between micro-batches, with a state that is no weight


class Case(NamedTuple):
    """A run, and the signal that it sends itself: at batch ``at`` of training, or at ``when`` in step ``at``."""

    overrides: tuple[str, ...] = ()
    signum: int = signal.SIGTERM
    at: int = 2
    step: int = 3  # optimizer steps done when it stops
    when: str = "train_batch_start"


CASES = {
    "sigterm": Case(),
    "sigint between logged steps": Case(("trainer.log_every_n_steps=4",), signal.SIGINT),
    "adamw in the second epoch": Case(
        ("optimizer=adamw", "scheduler=warmup_stable_decay", "data.batch_size=16", "trainer.max_steps=8"), at=5, step=6
    ),
    "while a checkpoint is written": Case(
        ("callbacks.interruption.every_n_steps=2",), at=2, step=3, when="save_checkpoint"
    ),
    "averaged weights in the middle of a validation": Case(
        ("callbacks=averaging", "data.eval_batch_size=2"), at=5, step=5, when="validation_batch_start"
    ),
    "balancing bias": Case((BIAS, "model.gating.bias_step=0.05", "trainer.accumulate_grad_batches=2"), at=4, step=3),
}

REFUSED = {  # each where a run that was stopped has left its checkpoints
    "automatic start with another seed": ("auto_resume=true", "seed=1"),
    "automatic start with a callback that changes weights": ("auto_resume=true", "callbacks=qk_clip"),
    "another position": ("ckpt_path=last", "model/position=alibi"),
    "another optimizer": ("ckpt_path=last", "optimizer=adamw"),
}

CALLBACKS = """
import os

import lightning as L

from blockwright.training.data.tokenizers.tokenizer import Bytes


class Stopped(Bytes):
    '''Asks its own process to stop while it tokenises.'''

    def encode(self, *args, **kwargs):
        os.kill(os.getpid(), 15)
        return super().encode(*args, **kwargs)


class Sends(L.Callback):
    '''Asks its own process to stop, before a batch is computed.'''

    observes = "sends signals"

    def __init__(self, signum: int, at: int, times: int = 1, when: str = "train_batch_start"):
        self.signum, self.at, self.times, self.when = signum, at, times, when

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.send("train_batch_start", trainer, trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_batch_start(self, trainer, task, batch, batch_idx):
        if trainer.state.fn == "validate":
            self.send("final", trainer, trainer.global_step)
        elif batch_idx == 1:
            self.send("validation_batch_start", trainer, trainer.global_step)

    def on_save_checkpoint(self, trainer, task, checkpoint):
        self.send("save_checkpoint", trainer, trainer.global_step)

    def send(self, when, trainer, now):
        if when == self.when and now == self.at and trainer.is_global_zero:
            if not self.signum:
                raise RuntimeError("crashed")
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)
"""

# Pictures are a quarter of the time of a run this short.
FIRST = "from blockwright.lab import run_report\nrun_report.plot_losses = run_report.plot_expert_load = lambda *_: None"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "signal_callbacks.py").write_text(CALLBACKS)
    return folder


@pytest.fixture(scope="module")
def base(small: list[str], folder: Path) -> list[str]:
    quick = ["logger=none", "trainer.val_check_interval=5"]
    quick += ["callbacks.report.sample_tokens=0", "callbacks.throughput=null"]
    return [*small, *quick, f"paths.log_dir={folder}/logs"]


def sends(signum: int, at: int, times: int = 1, when: str = "train_batch_start") -> list[str]:
    callback = {"_target_": "signal_callbacks.Sends", "signum": int(signum), "at": at, "times": times, "when": when}
    return [f"+callbacks.sends={json.dumps(callback)}".replace('"', "")]


Said = dict[str, Outcome]
Stories = Callable[[dict[str, list[str]]], Said]


@pytest.fixture(scope="module")
def stories(warm: Warm, environment: dict[str, str], folder: Path) -> Stories:
    there = {**environment, "PYTHONPATH": str(folder)}
    return lambda commands: run_all(warm.run, commands, FIRST, cwd=folder, env=there, timeout=500)


def case_of(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """The folders of a case: stopped, whole, resumed."""
    i = list(CASES).index(name)
    return folder / f"logs/case{i}/runs/a", folder / f"{i}/whole", folder / f"{i}/on"


def three(base: list[str], folder: Path, name: str) -> dict[str, list[str]]:
    """A case never stopped; stopped; resumed."""
    case, (stopped, whole, on) = CASES[name], case_of(name, folder)
    run = [*base, *case.overrides]
    return {
        f"{name} whole": [*run, f"hydra.run.dir={whole}"],
        f"{name} stopped": [*run, f"hydra.run.dir={stopped}", *sends(case.signum, case.at, when=case.when)],
        f"{name} resumed": [*run, f"hydra.run.dir={on}", "ckpt_path=last", f"task_name={stopped.parts[-3]}"],
    }


@pytest.fixture(scope="module")
def once(base: list[str], stories: Stories, folder: Path) -> Said:
    """One case, and a run that would overwrite what it left."""
    there = f"callbacks.checkpoint.dirpath={case_of(QUICK, folder)[0]}/checkpoints"
    return stories({**three(base, folder, QUICK), "over it": [*base, there]})


@pytest.fixture(scope="module")
def said(base: list[str], stories: Stories, folder: Path, once: Said) -> Said:
    """The other cases and stories."""

    def at(run: str) -> str:
        return f"hydra.run.dir={folder}/{run}"

    def last(run: str) -> str:
        return f"ckpt_path={folder}/{run}/checkpoints/last.ckpt"

    crashes = [*base, "trainer.val_check_interval=3"]
    longer = [*base, "scheduler=constant", "trainer.max_steps=8"]
    # The embedding is tied, so that each step at this rate makes it worse.
    worse = [*base, "scheduler=constant", "optimizer.lr=3.0", "trainer.val_check_interval=2"]
    worse += ["model.tie_embeddings=true", "model.scale_embeddings=false"]
    fresh = [*base, f"paths.data_dir={folder}/data"]
    scratch = [*base, "task_name=scratch", f"callbacks.checkpoint.dirpath={folder}/scratch"]
    cases = {k: v for name in CASES if name != QUICK for k, v in three(base, folder, name).items()}
    commands = {
        **cases,
        "impatient": [*base, at("impatient"), *sends(signal.SIGINT, 2, times=2)],
        "crashed": [*crashes, at("crashed"), "+callbacks.sends={_target_: signal_callbacks.Sends, signum: 0, at: 4}"],
        "on after a crash": [*crashes, at("on"), last("crashed")],
        "long": [*longer, at("long")],
        "short": [*longer, "trainer.max_steps=6", at("short")],
        "longer": [*longer, at("longer"), last("short")],
        "worse": [*worse, at("worse")],
        "in the data": [*fresh, at("in_data"), "data.tokenizer._target_=signal_callbacks.Stopped"],
        "data again": [*fresh, at("data_again"), "trainer.max_steps=1"],
        "in the end": [*base, at("in_end"), *sends(15, 6, when="final")],
        "end again": [*base, at("end_again"), last("in_end")],
        "scratch stopped": [*scratch, "auto_resume=true", *sends(15, 2)],
        **{name: [*scratch, *more] for name, more in REFUSED.items()},
        "scratch on": [*scratch, "auto_resume=true", at("logs/scratch/runs/on")],
        "worse on": [*worse, last("worse"), at("worse_on"), "trainer.max_steps=8"],
        "cli stopped": ["fit", "--compose", *base, "task_name=cli", *sends(signal.SIGTERM, 2)],
    }
    return stories(commands)


def final(run: Path) -> dict[str, float]:
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    return {k: v for k, v in metrics.items() if not k.startswith("speed/")}


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_whole(on: Path, whole: Path, curves: bool = True) -> None:
    """To the last bit: figures, weights, averaged weights, curves."""
    assert final(on) == final(whole) and final(on)["val/loss"] > 0
    ours, theirs = checkpoint(on), checkpoint(whole)
    assert ours["global_step"] == theirs["global_step"]
    for kept in ("state_dict", "current_model_state"):
        one, other = ours.get(kept, {}), theirs.get(kept, {})
        assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []
    ours, theirs = (each["callbacks"]["RunReport"] for each in (ours, theirs))
    assert not curves or (ours["train"] == theirs["train"] and ours["val"] == theirs["val"])


def assert_stopped_and_resumed(name: str, said: Said, folder: Path) -> None:
    """It left a checkpoint, said how to resume, and on is the run that never stopped."""
    case, (stopped, whole, on) = CASES[name], case_of(name, folder)
    code, text = said[f"{name} stopped"].code, said[f"{name} stopped"].said
    assert code == 75 and "Traceback" not in text, text
    assert f"stopped by {signal.Signals(case.signum).name} after step {case.step}. Continue with " in text
    assert f"ckpt_path={stopped}/checkpoints/last.ckpt" in text
    assert checkpoint(stopped)["global_step"] == case.step and not (stopped / "results.json").exists()
    assert said[f"{name} whole"].code == said[f"{name} resumed"].code == 0, said[f"{name} resumed"].said
    assert_whole(on, whole)


def test_stopped_and_resumed_run_is_the_run_that_never_stopped(once: Said, folder: Path) -> None:
    assert_stopped_and_resumed(QUICK, once, folder)


def test_balancing_bias_has_moved_and_survives(once: Said, folder: Path) -> None:
    stopped, _, on = case_of(QUICK, folder)
    bias, end = (checkpoint(run)["state_dict"]["decoder.layers.1.ffn.gating.bias"] for run in (stopped, on))
    assert once and bias.abs().max() > 0 and not torch.equal(bias, end)
    assert (bias / 0.05).round().sub(bias / 0.05).abs().max() < 1e-4  # whole steps
    assert bias.abs().max() <= 0.05 * 3 + 1e-6  # one an optimizer step, of which there were three


def assert_refused(outcome: Outcome) -> None:
    text = outcome.said
    assert outcome.code == 64 and text.count("error: ") == 1 and "Traceback" not in text and "step=" not in text, text


def test_new_run_that_would_overwrite_a_checkpoint_is_refused_with_one_message(once: Said) -> None:
    assert_refused(once["over it"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != QUICK])
def test_run_stopped_anywhere_is_the_run_that_never_stopped(name: str, said: Said, folder: Path) -> None:
    assert_stopped_and_resumed(name, said, folder)


RESUMED = {  # what ended well → its folder, and that of the run that it has to be
    "longer": ("longer", "long"),  # a finished run made longer
    "scratch on": ("logs/scratch/runs/on", "0/whole"),  # whose checkpoints are elsewhere, found from its folder
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_run_that_resumes_is_the_run_that_never_stopped(name: str, said: Said, folder: Path) -> None:
    assert said[name].code == 0, said[name].said
    assert_whole(*(folder / run for run in RESUMED[name]), curves=False)
    assert said["scratch stopped"].code == 75
    assert checkpoint(folder / "short")["global_step"] == 6  # though no validation fell on it


@pytest.mark.slow
def test_crashed_run_resumes_from_its_last_validation(said: Said, folder: Path) -> None:
    assert said["crashed"].code == "raised" and "crashed" in said["crashed"].said
    assert checkpoint(folder / "crashed")["global_step"] == 3
    assert said["on after a crash"].code == 0, said["on after a crash"].said
    assert final(folder / "on")["val/loss"] == final(folder / "0" / "whole")["val/loss"]


@pytest.mark.slow
def test_last_checkpoint_is_the_newest_and_the_best_that_of_the_whole_run(said: Said, folder: Path) -> None:
    """Though nothing improves, and also after a resume."""
    assert said["worse"].code == said["worse on"].code == 0, said["worse on"].said
    val = [float(x) for x in re.findall(r"val/loss=(\S+)", said["worse"].said)]
    assert checkpoint(folder / "worse", "best")["global_step"] == 2 * (1 + val.index(min(val))) < 6, val
    assert checkpoint(folder / "worse")["global_step"] == 6
    old, new = (folder / run / "checkpoints" / "best.ckpt" for run in ("worse", "worse_on"))
    assert new.read_bytes() == old.read_bytes()


@pytest.mark.slow
def test_signal_while_data_are_built_stops_at_once_and_leaves_nothing_half_done(said: Said, folder: Path) -> None:
    code, text = said["in the data"].code, said["in the data"].said
    assert code == 75 and "stopped by SIGTERM outside of training" in text and "Traceback" not in text
    assert not list((folder / "data").rglob("*.partial")) and not list((folder / "in_data").rglob("*.ckpt"))
    assert said["data again"].code == 0, said["data again"].said


@pytest.mark.slow
def test_signal_in_the_final_validation_leaves_the_last_checkpoint_to_resume_from(said: Said, folder: Path) -> None:
    code, text = said["in the end"].code, said["in the end"].said
    assert code == 75 and "stopped by SIGTERM after step 6" in text and "Traceback" not in text
    assert (
        f"ckpt_path={folder}/in_end/checkpoints/last.ckpt" in text and checkpoint(folder / "in_end")["global_step"] == 6
    )
    again, whole = final(folder / "end_again"), final(folder / "0" / "whole")
    assert said["end again"].code == 0 and again == {name: whole[name] for name in again}  # it need not train


@pytest.mark.slow
def test_what_would_overwrite_or_misread_a_checkpoint_is_refused_with_one_message(said: Said) -> None:
    for name in REFUSED:
        assert_refused(said[name])


@pytest.mark.slow
def test_cli_door_says_how_to_resume_and_a_second_ctrl_c_saves_nothing(said: Said, folder: Path) -> None:
    code, text = said["cli stopped"].code, said["cli stopped"].said
    assert code == 75 and "Traceback" not in text, text
    (told,) = re.findall(r"stopped by SIGTERM after step 3\. Continue .* --ckpt_path=(\S+)", text)
    assert Path(folder, told).is_file()
    code, text = said["impatient"].code, said["impatient"].said
    assert code == 130 and "Traceback" not in text and not list((folder / "impatient").rglob("*.ckpt"))


@pytest.mark.slow
def test_signal_from_outside_ends_the_process_with_its_code(
    base: list[str], warm: Warm, environment: dict[str, str], folder: Path
) -> None:
    long = ["trainer.max_steps=100000", "trainer.val_check_interval=100000", "data.corpus.val_fraction=0"]
    command = [str(ROOT / "train.py"), *base, *long, f"hydra.run.dir={folder}/outside"]
    process = warm.start(*command, cwd=folder, env=environment, merge=True)
    while "\nstep=3 " not in process.read():
        assert process.poll() is None, process.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    told = re.search(r"stopped by SIGTERM after step (\d+)\. Continue .* ckpt_path=(\S+)", text)
    assert told and torch.load(told[2], weights_only=True)["global_step"] == int(told[1]) >= 3


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(base: list[str], folder: Path, train_py: Any, tmp_path: Path) -> None:
    both, path = [*base, "trainer=ddp_sim"], {"PYTHONPATH": str(folder)}
    whole = train_py(*both, f"hydra.run.dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    stopped = train_py(*both, f"hydra.run.dir={tmp_path}/stopped", *sends(signal.SIGTERM, 2), **path)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    on = train_py(*both, f"hydra.run.dir={tmp_path}/on", f"ckpt_path={tmp_path}/stopped/checkpoints/last.ckpt")
    assert on.returncode == 0, on.stderr
    assert final(tmp_path / "on") == final(tmp_path / "whole")
