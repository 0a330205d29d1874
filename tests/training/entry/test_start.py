"""What a run starts from, checked before the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from blockwright.registry import ConfigError
from blockwright.training.tasks.causal_lm import CausalLM

Checked = Callable[..., dict[str, Any]]


class Improving(CausalLM):
    """A plug-in's task that says that random weights are no start for it."""

    improves = True


def refusal(checked: Checked, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        checked(*overrides)
    return caught.value


def test_without_training_something_trained_is_measured(checked: Checked) -> None:
    assert refusal(checked, "train=false", "test=true").path == "ckpt_path"
    checked("train=false", "trainer.dry_run=true")


def test_checkpoint_of_another_model_is_refused_before_the_run(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit("model/attention=gqa", "trainer.max_steps=1").save_checkpoint(tmp_path / "x.ckpt")
    error = refusal(checked, "model/attention=mha", f"ckpt_path={tmp_path}/x.ckpt")
    assert error.path == "ckpt_path" and "model.attention" in error.remedy
    checked("model/attention=gqa", "optimizer.lr=0.5", "seed=5", f"ckpt_path={tmp_path}/x.ckpt")


@pytest.mark.slow
def test_weights_of_another_position_are_refused_before_the_run_unless_allowed(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit("trainer.max_steps=1").save_checkpoint(tmp_path / "x.ckpt")
    other = ["model/position=alibi", f"ckpt_path={tmp_path}/x.ckpt"]
    error = refusal(checked, *other)
    assert "model.position was rope, is alibi" in error.rule and "resume.changed=allow" in error.remedy
    checked(*other, "resume.changed=allow")
    assert refusal(checked, *other, "resume.changed=perhaps").path == "resume.changed"


@pytest.mark.slow
def test_state_of_another_optimizer_is_refused_before_the_run(
    checked: Checked, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit("trainer.max_steps=1").save_checkpoint(tmp_path / "x.ckpt")
    error = refusal(checked, "optimizer=adamw", f"ckpt_path={tmp_path}/x.ckpt")
    assert (error.path, error.value) == ("optimizer", "AdamW") and "muon" in error.rule
    checked("optimizer.momentum=0.9", f"ckpt_path={tmp_path}/x.ckpt")
    checked("optimizer=adamw", "train=false", f"ckpt_path={tmp_path}/x.ckpt")
    fit("trainer.max_steps=1").save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "no training state" in refusal(checked, f"ckpt_path={tmp_path}/weights.ckpt").rule
