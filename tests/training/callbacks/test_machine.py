"""A run sets its process up before it computes; both doors and every process go through callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from blockwright.training.callbacks import machine
from blockwright.training.entry.execute import execute


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("keep", "kept"), [(True, 1), (False, 0)])
def test_settings_are_made_as_configured(
    keep: bool, kept: int, checked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: calls.append("kept"))
    run = checked("logger=none", "trainer.max_steps=1", "test=false")
    node = {"_target_": "blockwright.training.callbacks.machine.Machine", "float32_matmul": "high", "keep_memory": keep}
    execute(replace(run, callbacks={"machine": node}))
    assert torch.get_float32_matmul_precision() == "high"
    assert len(calls) >= kept and bool(calls) == keep
