from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.output_gate.elementwise import Elementwise
from blockwright.registry import register


@register("output_gate", "silu")
class SiLU(Elementwise):
    """A SiLU gate for every element of every head: unlike a sigmoid's, it is unbounded and may change signs.

    Gated DeltaNet, arXiv 2412.06464; Qwen3-Next: y ← silu(W x) ⊙ y, W of N·H rows.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * F.silu(self.project(x)).view_as(y)
