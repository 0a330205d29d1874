from __future__ import annotations

from torch import Tensor

from blockwright.blocks.ffn.swiglu import SwiGLU
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.situ import situ_glu
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("ffn", "situ")
class SiTU(SwiGLU):
    """``swiglu`` whose halves saturate smoothly, unlike those of ``bounded_swiglu``.

    Kimi K3, arXiv 2607.24653: y = W_down (β tanh(g/β) σ(g) ⊙ λ tanh(u/λ)) with g = W_gate x and u = W_up x.

    Args:
        d_ff: F, hidden width; null is 8/3 of d_model, rounded up to a multiple of 64
        bound: β, of the gate; 4 in K3
        linear_bound: λ, of the other half; 25 in K3, null for none
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        bound: Positive = 4.0,
        linear_bound: Positive | None = 25.0,
    ) -> None:
        super().__init__(d_model, d_ff)
        self.bound, self.linear_bound = bound, linear_bound

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.down(situ_glu(self.gate(x), self.up(x), self.bound, self.linear_bound)), None
