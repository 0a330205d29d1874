from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.experts.swiglu import SwiGLUExperts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.grouped_matmul import combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.registry import register


@register("experts", "geglu")
class GEGLUExperts(SwiGLUExperts):
    """``swiglu`` with a GELU gate: gelu(g) ⊙ u, by the tanh approximation, as in Gemma 4.

    Shazeer 2020, arXiv 2002.05202. Weights are those of ``swiglu``.

    Args:
        d_ff: F, hidden width of one expert
    """

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        order = sort_by_expert(routing.experts, self.n_experts, routing.pairs)
        gate, up = grouped_matmul(dispatch(x, order), self.gate_up.to(x.dtype), order.ends).chunk(2, -1)
        weights = routing.weights.flatten().index_select(0, order.sorted).to(gate.dtype)[:, None]
        hidden = F.gelu(gate, approximate="tanh") * up * weights
        return combine(grouped_matmul(hidden, self.down.to(x.dtype), order.ends), order)
