from __future__ import annotations

from torch import Tensor

from blockwright.blocks.experts.swiglu import SwiGLUExperts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.grouped_matmul import combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.blocks.situ import situ_glu
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("experts", "situ")
class SiTUExperts(SwiGLUExperts):
    """``swiglu`` whose halves saturate smoothly, unlike those of ``bounded_swiglu``.

    Kimi K3, arXiv 2607.24653: y = Σ_k w_k W_down,e (β tanh(g/β) σ(g) ⊙ λ tanh(u/λ)) with [g; u] = W_gate_up,e x. The
    router's weight is applied to the hidden vector.

    Args:
        d_ff: F, hidden width of one expert
        bound: β, of the gate; 4 in K3
        linear_bound: λ, of the other half; 25 in K3, null for none
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        d_ff: Count,
        bound: Positive = 4.0,
        linear_bound: Positive | None = 25.0,
    ) -> None:
        super().__init__(d_model, n_experts, d_ff)
        self.bound, self.linear_bound = bound, linear_bound

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        order = sort_by_expert(routing.experts, self.n_experts, routing.pairs)
        gate, up = grouped_matmul(dispatch(x, order), self.gate_up.to(x.dtype), order.ends).chunk(2, -1)
        weights = routing.weights.flatten().index_select(0, order.sorted).to(gate.dtype)[:, None]
        hidden = situ_glu(gate, up, self.bound, self.linear_bound) * weights
        return combine(grouped_matmul(hidden, self.down.to(x.dtype), order.ends), order)
