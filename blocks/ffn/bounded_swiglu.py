from __future__ import annotations

from torch import Tensor

from blockwright.blocks.convolution.base import Convolution
from blockwright.blocks.ffn.swiglu import SwiGLU
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("ffn", "bounded_swiglu")
class BoundedSwiGLU(SwiGLU):
    """``swiglu`` whose halves are bounded: silu(min(g, limit)) ⊙ clamp(u, ±limit), as in DeepSeek-V4.

    Args:
        limit: bound of the two halves before the gate
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        limit: Positive = 10.0,
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, gate_conv, up_conv)
        self.limit = limit

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().activated(gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit))
