"""What is refused before anything is built, seen from inside: the checks between the parts of a configuration."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from blockwright.blocks.kernels.choice import KERNELS
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.record import record
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry import preflight, room, start
from blockwright.training.entry.parse import parse

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


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.frozen=[attention]", "adapter=lora", "model/attention=gqa", "callbacks=[default,early_stopping]"],
    ],
)
def test_no_check_changes_a_run(overrides: list[str], small: list[str], tmp_path: Path) -> None:
    run = parse(compose_config([*small, *overrides], output_dir=str(tmp_path / "run")))
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("accumulate_grad_batches", 0), ("gradient_clip_val", -0.5)],
)
def test_number_of_the_trainer_has_a_least_value(checked: Checked, key: str, value: float) -> None:
    assert refusal(checked, f"trainer.{key}={value}").path == f"trainer.{key}"


@pytest.mark.parametrize(("steps", "every", "logged"), [(20, 25, 20), (40, 25, 25)])
def test_run_shorter_than_the_interval_logs_its_last_step(
    checked: Checked, steps: int, every: int, logged: int
) -> None:
    plain = checked(f"trainer.max_steps={steps}", f"trainer.log_every_n_steps={every}")
    assert plain["trainer"]["log_every_n_steps"] == logged


def test_training_counted_in_epochs_needs_no_number_of_steps(checked: Checked) -> None:
    assert refusal(checked, "trainer.max_steps=-1").path == "trainer.max_steps"
    checked("trainer.max_steps=-1", "trainer.max_epochs=2")
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
