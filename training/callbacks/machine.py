"""Process-wide settings, made before anything large is computed, in every process of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import lightning as L

from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.products import Choice, Precision, use
from blockwright.blocks.kernels.seam import implementations
from blockwright.blocks.kernels.timing import AUTO, ROWS, TORCH, fastest, matrices
from blockwright.registry import ConfigError, did_you_mean


class Machine(L.Callback):
    """Chooses how a CPU multiplies fp32 matrices and what happens to freed memory (blocks/kernels/timing.py).

    What ``auto`` has chosen is the same on all ranks, is in every checkpoint, and is kept by a resumed run, which so
    repeats to the last bit on the same machine, whatever a measurement would say by then. The settings outlive the
    callback.

    Args:
        float32_matmul: for ``torch.set_float32_matmul_precision``, or ``auto``: the fastest with full precision on this
            machine, never TF32. Routers always keep full precision
        few_rows: the implementation of ``linear`` that few rows are asked to take, as in sampling, or ``auto``: the
            fastest; ``torch`` uses no other
        keep_memory: whether freed memory stays with the process

    Raises:
        ConfigError: at ``callbacks.machine.few_rows``: there is no such implementation
    """

    def __init__(
        self,
        float32_matmul: Precision | Literal["auto"] = "auto",
        few_rows: str = "auto",
        keep_memory: bool = True,
    ) -> None:
        known = (AUTO, *implementations("linear"))
        if few_rows not in known:
            rule = f"linear has no such implementation ({', '.join(known)})"
            raise ConfigError("callbacks.machine.few_rows", few_rows, rule, did_you_mean(few_rows, known))
        self.float32_matmul, self.few_rows, self.keep_memory = float32_matmul, few_rows, keep_memory
        self.chosen: Choice | None = None
        self._device_type = "cpu"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device_type = trainer.strategy.root_device.type
        self._use(self.chosen or Choice())
        if self.keep_memory:
            keep_freed_memory()

    def _choose(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once there is a model."""
        if self.chosen is not None or self._device_type != "cpu":
            return
        stated = None if self.float32_matmul == AUTO else cast(Precision, self.float32_matmul)
        if stated is None or self.few_rows == AUTO:
            first = fastest(matrices(pl_module), stated) if trainer.is_global_zero else None
            self.chosen = trainer.strategy.broadcast(first)
        self._use(self.chosen or Choice())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._choose(trainer, pl_module)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def _use(self, choice: Choice) -> None:
        """A choice, but for what is stated."""
        stated = self.float32_matmul != AUTO
        matmul = cast(Precision, self.float32_matmul) if stated else choice.matmul
        rows, cached = choice.few_rows, choice.cached
        if self.few_rows != AUTO:
            rows, cached = {ROWS[-1]: (self.few_rows,)}, self.few_rows != TORCH
        use(Choice(matmul, rows, cached, choice.found), self._device_type, stated)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.chosen is None else self.chosen.as_plain()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.chosen = Choice.read(state_dict)
        if self.chosen is not None:
            self._use(self.chosen)
