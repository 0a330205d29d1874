from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.experts.swiglu import SwiGLUExperts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.grouped_matmul import combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("experts", "bounded_swiglu")
class BoundedSwiGLUExperts(SwiGLUExperts):
    """``swiglu`` whose halves are bounded: silu(min(g, limit)) ⊙ clamp(u, ±limit), as in DeepSeek-V4.

    Weights are those of ``swiglu``. gpt-oss's ``clamped_swiglu`` has biases, a sharper gate and a one added to u.

    Args:
        d_ff: F, hidden width of one expert
        limit: bound of the two halves before the gate
    """

    def __init__(self, d_model: int, n_experts: int, d_ff: Count, limit: Positive = 10.0) -> None:
        super().__init__(d_model, n_experts, d_ff)
        self.limit = limit

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        order = sort_by_expert(routing.experts, self.n_experts, routing.pairs)
        gate, up = grouped_matmul(dispatch(x, order), self.gate_up.to(x.dtype), order.ends).chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        weights = routing.weights.flatten().index_select(0, order.sorted).to(gate.dtype)[:, None]
        return combine(grouped_matmul(F.silu(gate) * up * weights, self.down.to(x.dtype), order.ends), order)
