"""A training that the memory cannot hold is refused before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from blockwright.blocks.refusals import size
from blockwright.registry import ConfigError
from blockwright.training.configuration.run import Run
from blockwright.training.entry import room
from blockwright.training.entry.start import outline_of

Checked = Callable[..., Run]
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
