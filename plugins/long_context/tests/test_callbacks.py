"""Callbacks of long contexts: longer windows, figures as declared, the ablation of extensions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.lab.ablation import definition, planning
from blockwright.registry import ConfigError
from blockwright.training.configuration.composing import compose_config
from blockwright.training.data.modules.text import TextDataModule
from blockwright.training.entry.execute import execute
from blockwright.training.entry.preflight import preflight
from tests.lab import test_figures as figures

LONG = ["callbacks=extrapolation", "model.max_positions=128", "logger=none", "~callbacks.report"]
LONG += ["~callbacks.checkpoint", "~callbacks.interruption"]
Measured = Callable[..., dict[str, float]]
YARN = "callbacks.extrapolation.position={name:yarn,factor:4,original_positions:32,pairing:half_split}"


@pytest.fixture
def measured(checked: Callable[..., dict[str, Any]]) -> Measured:
    def figures(*overrides: str) -> dict[str, float]:
        return execute(checked("trainer.max_steps=2", "model/attention=mha", *LONG, *overrides))

    return figures


@pytest.mark.slow
def test_longer_windows_are_the_same_tokens_and_another_position_block_takes_over_for_them_alone(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, tuple[int, int]] = {}
    ours = TextDataModule.val_windows

    def noted(self: TextDataModule, length: int) -> Any:
        batches = list(ours(self, length))
        targets = torch.cat([batch["targets"] for batch in batches])
        seen[length] = (targets.shape[1], int((targets != IGNORED).sum()))
        return batches

    monkeypatch.setattr(TextDataModule, "val_windows", noted)
    own = measured("callbacks.extrapolation.multiples=[1,4]")
    assert seen[32][0] == 32 and seen[128][0] == 128 and seen[32][1] == seen[128][1] > 32
    assert own["extrapolation/loss_1x"] == pytest.approx(own["val/loss"], rel=1e-6)
    assert own["extrapolation/loss_4x"] != pytest.approx(own["val/loss"], rel=1e-6)
    yarn = measured("callbacks.extrapolation.multiples=[1,4]", YARN)
    assert yarn["val/loss"] == own["val/loss"]
    assert yarn["extrapolation/loss_4x"] != own["extrapolation/loss_4x"]


@pytest.mark.slow
def test_conversations_are_refused_before_training(measured: Measured, tmp_path: Path) -> None:
    """They are packed whole: in longer rows they are what they are in shorter ones."""
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "hi", "completion": "yo"}\n' * 300)
    with pytest.raises(ConfigError, match="never longer than a row"):
        measured("data=chat", f"data.corpus.files={file}", "data/tokenizer=bytes")


EXTENDED = ("mha", "yarn untuned", "none pose", "longrope", "mla", "mla yarn")  # an arm of each kind


@pytest.mark.slow
def test_arms_of_the_extension_start_from_the_weights_of_the_arm_they_name(small: list[str], tmp_path: Path) -> None:
    plan = planning.make(definition.read("extend_context"))
    jobs = {job["arm"]: job for job in plan.jobs if job["seed"] == 0}
    assert {jobs[name]["after"] for name in ("linear", "yarn pose")} == {jobs["mha"]["job"]}
    assert jobs["mla none"]["after"] == jobs["mla"]["job"] and "after" not in jobs["mla"]
    quick = ["trainer.max_steps=4", "trainer.val_check_interval=4", "++trainer.limit_val_batches=1", "logger=none"]
    quick += ["~callbacks.report", *(f"callbacks.long_context.{key}=1" for key in ("samples", "stretches"))]
    quick += [o for o in small if o.startswith("paths.")]
    found = {}
    for name in EXTENDED:
        job = jobs[name]
        start = [f"init_from={tmp_path / str(job['after'])}"] if "after" in job else []
        config = compose_config([*job["overrides"], *quick, *start], output_dir=str(tmp_path / str(job["job"])))
        found[name] = execute(preflight(config))
    assert found["yarn untuned"]["val/loss"] != found["mha"]["val/loss"]
    for metrics in found.values():
        assert set(plan.definition.also) | {plan.definition.metric} <= set(metrics)


pytestmark = pytest.mark.xdist_group("figures")
trained = figures.trained
CALLBACKS = [
    *("callbacks=[long_context,extrapolation]", "callbacks.extrapolation.multiples=[2]"),
    *(
        f"callbacks.long_context.{each}"
        for each in ("lengths=[64]", "window=16", "samples=1", "symbols=[1,64]", "stretches=1")
    ),
]


@pytest.mark.slow
def test_callbacks_log_what_they_declare(trained: Callable[..., Path]) -> None:
    folder = trained("long_context", ["test=true", *CALLBACKS])
    assert figures.undeclared(folder) == set()
    assert figures.unlogged("long_context", folder) == figures.unlogged("extrapolation", folder) == []
