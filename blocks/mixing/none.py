from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.mixing.base import Mixing
from blockwright.registry import register


@register("mixing", "none")
class NoMixing(Mixing):
    """Streams stay apart: they are read together, and written to, as in Hunyuan-4."""

    n_logits = 0

    def __init__(self) -> None:
        super().__init__()

    def start(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return x
