"""What is refused before anything is built, seen from inside: the checks between the parts of a configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from blocks.kernels.choice import KERNELS
from registry import ConfigError
from training.configuration.instantiate import instantiate
from training.entry.preflight import check_seed

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

    assert plain(checked())


def test_model_is_complete_and_the_task_has_the_same(checked: Checked) -> None:
    plain = checked("model/attention=gqa")
    assert plain["task"]["model"] == plain["model"]
    assert plain["model"]["vocab_size"] == 257 and plain["model"]["init"]["depth_scaled"] is False


def test_checking_imports_no_lightning_and_writes_nothing(tmp_path: Path, small: list[str]) -> None:
    program = (
        "import sys; from training.configuration.composing import compose_config;"
        "from training.entry.preflight import preflight;"
        "preflight(compose_config(sys.argv[1:], output_dir='out')); sys.exit('lightning' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, *small], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.iterdir())


def test_batch_is_shared_by_all_processes_of_all_nodes(checked: Checked) -> None:
    checked("trainer=ddp_sim", "data.batch_size=4")
    error = refusal(checked, "trainer=ddp_sim", "data.batch_size=3")
    assert (error.path, error.value, error.remedy) == ("data.batch_size", 3, "Set data.batch_size=4")
    error = refusal(checked, "trainer=ddp_sim", "+trainer.num_nodes=3", "data.batch_size=4")
    assert error.remedy == "Set data.batch_size=6"
    error = refusal(checked, "trainer=ddp_sim", "data.eval_batch_size=9")
    assert (error.path, error.remedy) == ("data.eval_batch_size", "Set data.eval_batch_size=10")
    checked("trainer=ddp_sim", "trainer.devices=auto", "data.batch_size=3")  # how many that is shows later


@pytest.mark.parametrize("interval", ["0", "-3", "0.0"])
def test_validation_interval_is_a_number_of_steps(checked: Checked, interval: str) -> None:
    assert refusal(checked, f"trainer.val_check_interval={interval}").path == "trainer.val_check_interval"
    checked("trainer.val_check_interval=null")


@pytest.mark.parametrize(
    ("key", "value"),
    [("accumulate_grad_batches", 0), ("gradient_clip_val", -0.5), ("log_every_n_steps", -1), ("max_steps", -2)],
)
def test_number_of_the_trainer_has_a_least_value(checked: Checked, key: str, value: float) -> None:
    assert refusal(checked, f"trainer.{key}={value}").path == f"trainer.{key}"


@pytest.mark.parametrize("seed", [5_000_000_000, 2**32, -1, "abc", 1.0, True, None])
def test_seed_is_one_that_every_generator_takes(seed: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_seed(seed)
    assert (caught.value.path, caught.value.value) == ("seed", seed)
    check_seed(0)
    check_seed(2**32 - 1)


@pytest.mark.parametrize(
    "override",
    [
        "train=maybe",
        "test=no",
        "extras.print_config=no",
        "trainer.dry_run=no",
        "task_name=''",
        "task_name=null",
        "tags=abc",
        "optimized_metric=null",
    ],
)
def test_setting_at_the_top_is_what_it_has_to_be(checked: Checked, override: str) -> None:
    assert refusal(checked, override).path == override.partition("=")[0]


def test_without_training_something_trained_is_measured(checked: Checked) -> None:
    for test in ("true", "false"):
        assert refusal(checked, "train=false", f"test={test}").path == "ckpt_path"
    checked("train=false", "trainer.dry_run=true")


def test_training_counted_in_epochs_needs_no_number_of_steps(checked: Checked) -> None:
    assert refusal(checked, "trainer.max_steps=-1").path == "trainer.max_steps"
    checked("trainer.max_steps=-1", "trainer.max_epochs=2")
    checked("trainer.max_steps=-1", "scheduler=constant", "scheduler.warmup=5")


def test_warm_up_longer_than_a_training_that_does_not_take_place_is_no_matter(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = fit()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checked("train=false", "test=true", f"ckpt_path={tmp_path}/x.ckpt", "scheduler.warmup=5000")


def test_part_that_is_taken_away_is_named(checked: Checked) -> None:
    error = refusal(checked, "~extras")
    assert error.path == "extras"


def test_checkpoint_of_another_model_is_refused_before_the_run(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit("model/attention=gqa").save_checkpoint(tmp_path / "x.ckpt")
    checked("model/attention=gqa", f"ckpt_path={tmp_path}/x.ckpt")
    error = refusal(checked, "model/attention=mha", f"ckpt_path={tmp_path}/x.ckpt")
    assert error.path == "ckpt_path" and "model.attention" in error.remedy
    checked("model/attention=gqa", "optimizer.lr=0.5", "seed=5", f"ckpt_path={tmp_path}/x.ckpt")


def test_weights_of_another_position_are_refused_before_the_run_unless_allowed(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit().save_checkpoint(tmp_path / "x.ckpt")
    other = ["model/position=alibi", f"ckpt_path={tmp_path}/x.ckpt"]
    error = refusal(checked, *other)
    assert "model.position was rope, is alibi" in error.rule and "resume.changed=allow" in error.remedy
    checked(*other, "resume.changed=allow")
    assert refusal(checked, *other, "resume.changed=perhaps").path == "resume.changed"


def test_state_of_another_optimizer_is_refused_before_the_run(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit().save_checkpoint(tmp_path / "x.ckpt")
    error = refusal(checked, "optimizer=adamw", f"ckpt_path={tmp_path}/x.ckpt")
    assert (error.path, error.value) == ("optimizer", "AdamW") and "muon" in error.rule
    checked("optimizer.momentum=0.9", f"ckpt_path={tmp_path}/x.ckpt")
    checked("optimizer=adamw", "train=false", f"ckpt_path={tmp_path}/x.ckpt")
    fit().save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "no training state" in refusal(checked, f"ckpt_path={tmp_path}/weights.ckpt").rule


def test_configuration_names_every_kernel_and_a_wish_reaches_the_decoder(checked: Checked) -> None:
    plain = checked("task.kernels.attention=sdpa", "task.kernels.experts=grouped")
    assert tuple(plain["task"]["kernels"]) == KERNELS
    task = instantiate(plain["task"], "task")
    task.configure_model()
    assert (task.decoder.kernels.attention, task.decoder.kernels.experts) == ("sdpa", "grouped")
