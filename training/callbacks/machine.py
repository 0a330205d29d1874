"""Process-wide settings, made before anything large is allocated, in every process of a run."""

from __future__ import annotations

import lightning as L

from blockwright.blocks.kernels.machine import Matmul, keep_freed_memory, set_float32_matmul


class Machine(L.Callback):
    """Chooses how a CPU multiplies fp32 matrices and what happens to freed memory (blocks/kernels/machine.py).

    The settings outlive the callback.

    Args:
        float32_matmul: for ``torch.set_float32_matmul_precision``, or ``auto``: the fastest with full precision on this
            machine, never TF32. Routers always keep full precision
        keep_memory: whether freed memory stays with the process
    """

    def __init__(self, float32_matmul: Matmul = "auto", keep_memory: bool = True) -> None:
        self.float32_matmul: Matmul = float32_matmul
        self.keep_memory = keep_memory

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        set_float32_matmul(self.float32_matmul, trainer.strategy.root_device.type)
        if self.keep_memory:
            keep_freed_memory()
