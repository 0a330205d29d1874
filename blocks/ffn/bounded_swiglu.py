from __future__ import annotations

from torch import Tensor

from blockwright.blocks.ffn.swiglu import SwiGLU
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("ffn", "bounded_swiglu")
class BoundedSwiGLU(SwiGLU):
    """``swiglu`` whose halves are bounded: silu(min(g, limit)) ⊙ clamp(u, ±limit), as in DeepSeek-V4.

    Args:
        d_ff: F, hidden width; null is 8/3 of d_model, rounded up to a multiple of 64
        limit: bound of the two halves before the gate
    """

    def __init__(self, d_model: int, d_ff: Count | None = None, limit: Positive = 10.0) -> None:
        super().__init__(d_model, d_ff)
        self.limit = limit

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        gate, up = self.gate(x).clamp(max=self.limit), self.up(x).clamp(-self.limit, self.limit)
        return self.down(self.kernels.gate_silu(gate, up)), None
