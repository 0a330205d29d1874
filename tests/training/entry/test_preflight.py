"""What is refused before anything is built or allocated: the checks between the parts of a configuration."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from blockwright.blocks.kernels.choice import KERNELS
from blockwright.blocks.refusals import size
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.record import record
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import Run
from blockwright.training.entry import preflight, room, start
from blockwright.training.entry.parse import parse
from blockwright.training.entry.start import outline_of

ROOT = Path(__file__).resolve().parents[3]

Checked = Callable[..., dict[str, Any]]


def refusal(checked: Checked, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        checked(*overrides)
    return caught.value


def test_result_is_plain_types_with_nothing_left_to_resolve(checked: Checked) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(map(plain, value.values()))
        if isinstance(value, list):
            return type(value) is list and all(map(plain, value))
        return value is None or (isinstance(value, str | int | float) and "${" not in str(value) and value != "???")

    run = checked("model/attention=gqa")
    assert plain(dict(run))
    assert run["model"]["vocab_size"] == 257 and run["model"]["init"]["depth_scaled"] is False  # complete


def test_no_check_changes_a_run(small: list[str], tmp_path: Path) -> None:
    given = ["task.frozen=[attention]", "adapter=lora", "model/attention=gqa", "callbacks=[default,early_stopping]"]
    run = parse(compose_config([*small, *given], output_dir=str(tmp_path / "run")))
    before = copy.deepcopy(run)
    with contextlib.suppress(ConfigError):  # an adapter needs the weights of a model
        for each in (preflight.check, start.check_sources, start.refuse_untrained, room.check_room):
            each(run)
    assert run == before and run.shown == before and record(run) == record(before)


@pytest.mark.slow
def test_mistake_in_the_model_is_refused_without_lightning_and_checking_writes_nothing(
    tmp_path: Path, small: list[str]
) -> None:
    program = (
        "import sys; from blockwright.training.configuration.composing import compose_config;"
        "from blockwright.training.entry.preflight import preflight\n"
        "cfg = compose_config(sys.argv[1:], output_dir='out'); cfg.model.attention.n_heads, heads = 3, 2\n"
        "try: preflight(cfg)\n"
        "except ValueError as error: assert 'lightning' not in sys.modules and 'n_heads' in str(error), error\n"
        "else: raise AssertionError\n"
        "cfg.model.attention.n_heads = heads; preflight(cfg)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, *small], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.iterdir())


def test_value_that_the_data_lack_is_named_before_what_the_model_takes_from_them(checked: Checked) -> None:
    assert refusal(checked, "data/tokenizer=pretrained").path == "data.tokenizer.file"


@pytest.mark.slow
def test_batch_is_shared_by_all_processes_of_all_nodes(checked: Checked) -> None:
    checked("trainer=ddp_sim", "data.batch_size=4")
    error = refusal(checked, "trainer=ddp_sim", "data.batch_size=3")
    assert (error.path, error.value, error.remedy) == ("data.batch_size", 3, "Set data.batch_size=4")
    error = refusal(checked, "trainer=ddp_sim", "trainer.num_nodes=3", "data.batch_size=4")
    assert error.remedy == "Set data.batch_size=6"
    error = refusal(checked, "trainer=ddp_sim", "data.eval_batch_size=9")
    assert (error.path, error.remedy) == ("data.eval_batch_size", "Set data.eval_batch_size=10")


@pytest.mark.parametrize("override", ["trainer.accumulate_grad_batches=0", "trainer.gradient_clip_val=-0.5"])
def test_number_of_the_trainer_has_a_least_value(checked: Checked, override: str) -> None:
    assert refusal(checked, override).path == override.partition("=")[0]


def test_run_shorter_than_the_interval_logs_its_last_step_and_epochs_need_no_number_of_steps(checked: Checked) -> None:
    plain = checked("trainer.max_steps=20", "trainer.log_every_n_steps=25")
    assert plain["trainer"]["log_every_n_steps"] == 20
    assert refusal(checked, "trainer.max_steps=-1").path == "trainer.max_steps"
    checked("trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.log_every_n_steps=25")
    checked("trainer.max_steps=-1", "scheduler=constant", "scheduler.warmup=5")


@pytest.mark.slow
def test_warm_up_longer_than_a_training_that_does_not_take_place_is_no_matter(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = fit("trainer.max_steps=1")
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checked("train=false", "test=true", f"ckpt_path={tmp_path}/x.ckpt", "scheduler.warmup=5000")


def test_configuration_names_every_kernel_and_a_wish_reaches_the_decoder(checked: Checked) -> None:
    plain = checked("task.kernels.attention=sdpa", "task.kernels.experts=grouped")
    assert tuple(plain["task"]["kernels"]) == KERNELS
    task = parts.build("task", plain)
    task.configure_model()
    assert (task.decoder.kernels.attention, task.decoder.kernels.experts) == ("sdpa", "grouped")


# What a run starts from


def test_without_training_something_trained_is_measured(checked: Checked) -> None:
    assert refusal(checked, "train=false", "test=true").path == "ckpt_path"
    checked("train=false", "trainer.dry_run=true")


def test_checkpoint_of_another_model_is_refused_before_the_run(checked: Checked, fit: Any, tmp_path: Path) -> None:
    fit("model/attention=gqa", "trainer.max_steps=1").save_checkpoint(tmp_path / "x.ckpt")
    error = refusal(checked, "model/attention=mha", f"ckpt_path={tmp_path}/x.ckpt")
    assert error.path == "ckpt_path" and "model.attention" in error.remedy
    checked("model/attention=gqa", "optimizer.lr=0.5", "seed=5", f"ckpt_path={tmp_path}/x.ckpt")


@pytest.mark.slow
def test_weights_of_another_position_and_state_of_another_optimizer_are_refused_before_the_run(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = fit("trainer.max_steps=1")
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = ["model/position=alibi", f"ckpt_path={tmp_path}/x.ckpt"]
    error = refusal(checked, *other)
    assert "model.position was rope, is alibi" in error.rule and "resume.changed=allow" in error.remedy
    checked(*other, "resume.changed=allow")
    assert refusal(checked, *other, "resume.changed=perhaps").path == "resume.changed"
    error = refusal(checked, "optimizer=adamw", f"ckpt_path={tmp_path}/x.ckpt")
    assert (error.path, error.value) == ("optimizer", "AdamW") and "muon" in error.rule
    checked("optimizer.momentum=0.9", f"ckpt_path={tmp_path}/x.ckpt")
    checked("optimizer=adamw", "train=false", f"ckpt_path={tmp_path}/x.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "no training state" in refusal(checked, f"ckpt_path={tmp_path}/weights.ckpt").rule


ADAMW = "optimizer=adamw"  # two numbers of state for each of a weight


def with_trainer(run: Run, **settings: Any) -> Run:
    return replace(run, trainer={**run.trainer, **settings})


def needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> float:
    """Bytes that a run is refused below."""
    found: list[str] = []
    monkeypatch.setattr(room, "device_memory", lambda device: 1.0)
    with pytest.raises(ConfigError) as caught:
        room.check_room(run)
    found = caught.value.rule.split(" GB for")[0].split()
    return float(found[-1].replace(",", "")) * 1e9


@pytest.mark.slow
def test_weights_gradients_and_states_are_counted(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    run = checked(ADAMW)
    weights = 4 * size(outline_of(run))
    assert needs(run, monkeypatch) == pytest.approx(4 * weights, rel=0.01)
    assert needs(with_trainer(run, precision="bf16-true"), monkeypatch) == pytest.approx(2 * weights, rel=0.01)
    assert needs(checked(ADAMW, "trainer=[fsdp,sim]"), monkeypatch) == pytest.approx(4 * weights, rel=0.05)
    assert needs(checked(ADAMW, "task.frozen=[attention]"), monkeypatch) == pytest.approx(weights, rel=0.01)


@pytest.mark.slow
def test_what_fits_or_is_not_trained_passes(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    run = checked(ADAMW)
    room.check_room(run)
    monkeypatch.setattr(room, "device_memory", lambda device: 4.5 * 4 * size(outline_of(run)))
    room.check_room(run)
    monkeypatch.setattr(room, "device_memory", lambda device: 1.0)
    room.check_room(checked("train=false", "trainer.dry_run=true"))
    for foreign in ("deepspeed_stage_2", {"_target_": "lightning.pytorch.strategies.FSDPStrategy"}):
        room.check_room(with_trainer(run, strategy=foreign))
    with pytest.raises(ConfigError, match="GB for weights"):
        room.check_room(with_trainer(run, strategy="ddp"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    room.check_room(with_trainer(run, strategy="ddp"))
