"""Counts the bytes of collectives that a step puts through this rank, below whatever issued them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "allgather": "all_gather", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce", "all_reduce": "all_reduce", "alltoall": "all_to_all", "all_to_all": "all_to_all",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """``bytes``: collective → bytes of its full buffer; scalars and counts are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        space, _, rest = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            name = next((v for k, v in NAMES.items() if rest.lstrip("_").startswith(k)), None)
            if name == "all_to_all":
                self.bytes[name] += _floats(out)
            elif name:
                self.bytes[name] += max(_floats(args[0]), _floats(args[1]), _floats(out))
        return out


def _floats(value: Any) -> int:
    """Bytes of the largest fp32 tensor in an argument, if it has more than one number: metrics are fp64."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.dtype == torch.float32 and value.numel() > 1 else 0
    return max((_floats(v) for v in value), default=0) if isinstance(value, list | tuple) else 0


class FirstStep(L.Callback):
    """Counts the bytes of the first step."""

    def __init__(self) -> None:
        self.counted = Counted()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.counted.__enter__()

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.counted.__exit__(None, None, None)
