"""The loss on windows longer than those trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry import ConfigError
from blockwright.training.entry.execute import execute

LONG = [
    "callbacks=extrapolation",
    "model.max_positions=128",
    "logger=none",
    "~callbacks.report",
    "~callbacks.checkpoint",
    "~callbacks.interruption",
]
YARN = "callbacks.extrapolation.position={name:yarn,factor:4,original_positions:32,pairing:half_split}"


@pytest.fixture
def measured(checked: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, float]]:
    def figures(*overrides: str) -> dict[str, float]:
        return execute(checked("trainer.max_steps=2", "model/attention=mha", *LONG, *overrides))

    return figures


@pytest.mark.slow
def test_longer_windows_are_the_same_tokens(measured: Callable[..., dict[str, float]], monkeypatch: Any) -> None:
    """Each is scored once, in windows of four times the length."""
    from blockwright.training.data.modules.text import TextDataModule

    seen: dict[int, tuple[int, int]] = {}
    ours = TextDataModule.val_windows

    def noted(self: TextDataModule, length: int) -> Any:
        batches = list(ours(self, length))
        targets = torch.cat([batch["targets"] for batch in batches])
        seen[length] = (targets.shape[1], int((targets != IGNORED).sum()))
        return batches

    monkeypatch.setattr(TextDataModule, "val_windows", noted)
    measured("callbacks.extrapolation.multiples=[1,4]")
    assert seen[32][0] == 32 and seen[128][0] == 128 and seen[32][1] == seen[128][1] > 32


@pytest.mark.slow
def test_another_position_block_takes_over_for_the_longer_windows_alone(
    measured: Callable[..., dict[str, float]],
) -> None:
    own = measured("callbacks.extrapolation.multiples=[1,4]")
    assert own["extrapolation/loss_1x"] == pytest.approx(own["val/loss"], rel=1e-6)
    assert own["extrapolation/loss_4x"] != pytest.approx(own["val/loss"], rel=1e-6)
    yarn = measured("callbacks.extrapolation.multiples=[1,4]", YARN)
    assert yarn["val/loss"] == own["val/loss"]
    assert yarn["extrapolation/loss_4x"] != own["extrapolation/loss_4x"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.max_positions=64", "makes windows of 128 tokens, but the model has positions for 64"),
        ("callbacks.extrapolation.multiples=[]", "must list at least one"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    measured: Callable[..., dict[str, float]], override: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        measured(override)


@pytest.mark.slow
def test_conversations_are_refused_before_training(measured: Callable[..., dict[str, float]], tmp_path: Path) -> None:
    """They are packed whole: in longer rows they are what they are in shorter ones."""
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "hi", "completion": "yo"}\n' * 300)
    with pytest.raises(ConfigError, match="never longer than a row"):
        measured("data=chat", f"data.corpus.files={file}", "data/tokenizer=bytes")
