"""How a run sets its process up: as measured on the first rank, or as stated, and for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from blockwright.blocks.kernels import products
from blockwright.blocks.kernels.products import Choice, Faster, used
from blockwright.registry import ConfigError
from blockwright.training.callbacks import machine
from blockwright.training.callbacks.interruption import Interruption
from blockwright.training.callbacks.machine import Machine

FOUND = Choice("medium", {1: ("torch",), 8: ()}, True, (Faster("many rows", "oneDNN", "MKL", 1.5),))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "error_of_medium", lambda: 4e-7)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[Choice | None], list[Any]]:
    """Makes measurements find this, None for a test that must not measure; gives what they are of."""

    def make(choice: Choice | None) -> list[Any]:
        asked: list[Any] = []

        def fastest(*given: Any) -> Choice:
            assert choice is not None, "measured"
            asked.append(given)
            return choice

        monkeypatch.setattr(machine, "fastest", fastest)
        return asked

    return make


def trainer(rank: int = 0, device: str = "cpu", first: Choice | None = None) -> Any:
    """Of one rank; others receive what the first has found."""
    strategy = SimpleNamespace(root_device=torch.device(device), broadcast=lambda own: own if rank == 0 else first)
    return SimpleNamespace(strategy=strategy, is_global_zero=rank == 0)


def begun(callback: Machine, given: Any) -> Machine:
    model: Any = nn.Linear(128, 64)
    callback.setup(given, model, "fit")
    callback.on_fit_start(given, model)
    return callback


def test_settings_are_made_as_configured(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    calls: list[str] = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: calls.append("kept"))
    says(None)
    begun(Machine("high", few_rows="torch"), trainer())
    assert torch.get_float32_matmul_precision() == "high" and calls and used().few_rows == {8: ("torch",)}
    calls.clear()
    says(Choice())
    begun(Machine(keep_memory=False), trainer())
    assert not calls and torch.get_float32_matmul_precision() == "highest"


def test_first_rank_measures_for_all(says: Any) -> None:
    asked = says(FOUND)
    assert begun(Machine(), trainer()).chosen == FOUND == used() and asked == [({(64, 128): 1}, None)]
    says(None)
    other = Choice("highest", {1: ("torch",)})
    assert begun(Machine(), trainer(rank=1, first=other)).chosen == other == used()


def test_what_is_stated_is_not_measured_and_wins(says: Any) -> None:
    asked = says(FOUND)
    begun(Machine(few_rows="torch"), trainer())
    assert used() == Choice("medium", {8: ("torch",)}, False, FOUND.found)
    begun(Machine("medium"), trainer())
    assert used() == FOUND and [matmul for _, matmul in asked] == [None, "medium"]
    stated = Machine("highest")
    stated.load_state_dict(FOUND.as_plain())
    assert begun(stated, trainer()).chosen == FOUND and used().matmul == "highest" and used().cached
    with pytest.raises(ConfigError) as refused:
        Machine(few_rows="fast")
    assert refused.value.path == "callbacks.machine.few_rows"


def test_nothing_is_measured_on_another_device(says: Any) -> None:
    says(None)
    assert begun(Machine(), trainer(device="meta")).state_dict() == {}
    assert used() == Choice() and torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_a_damaged_state_is_none(says: Any) -> None:
    says(FOUND)
    callback = Machine()
    callback.load_state_dict({"matmul": "fast"})
    assert callback.chosen is None and begun(callback, trainer()).chosen == FOUND


def test_resumed_run_keeps_what_was_chosen(fit: Callable[..., L.Trainer], tmp_path: Path, says: Any) -> None:
    """To the last bit, whatever a measurement would find by then."""

    def weights(found: Choice, *overrides: str, last: Path | None = None) -> tuple[Machine, list[torch.Tensor]]:
        says(found)
        products.use(Choice())
        callback = Machine(keep_memory=False)
        ended = fit(*overrides, callbacks=[callback, Interruption()], ckpt_path=last, enable_checkpointing=True)
        parameters = [p.detach().clone() for p in ended.lightning_module.parameters()]
        return callback, parameters

    steps = ("scheduler=constant", "optimizer=adamw")
    _, whole = weights(FOUND, *steps, "trainer.max_steps=4")
    weights(FOUND, *steps, "trainer.max_steps=2")
    last = tmp_path / "checkpoints" / "last.ckpt"
    kept = torch.load(last, weights_only=True)["callbacks"]["Machine"]
    assert Choice.read(kept) == FOUND
    callback, resumed = weights(Choice(), *steps, "trainer.max_steps=4", last=last)
    assert callback.chosen == FOUND == used()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
