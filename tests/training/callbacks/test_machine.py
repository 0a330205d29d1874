"""A run sets its process up before it computes; both doors and every process go through callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blockwright.training.callbacks import machine


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_settings_are_made_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: calls.append("kept"))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    machine.Machine("high").setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == "high" and calls
    calls.clear()
    machine.Machine(keep_memory=False).setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert not calls
