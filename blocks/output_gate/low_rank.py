from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.linear import Linear
from blockwright.blocks.output_gate.base import OutputGate
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("output_gate", "low_rank")
class LowRank(OutputGate):
    """A sigmoid gate for every element of every head, from a projection of low rank.

    Kimi Linear, arXiv 2510.26692: y ← σ(W_up W_down x) ⊙ y.

    Args:
        rank: width of W_down x; null is the head width, as in Kimi-Linear
    """

    def __init__(self, d_model: int, n_heads: int, head_dim: int, rank: Count | None = None) -> None:
        super().__init__()
        self.down = Linear(d_model, rank or head_dim, bias=False)
        self.up = Linear(rank or head_dim, n_heads * head_dim, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.up(self.down(x)).sigmoid().view_as(y)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"down.weight": "replicate", "up.weight": "column"}
