from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.decay.base import LONGEST, SHORTEST
from blockwright.blocks.decay.channel import ByChannel
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("decay", "full_rank")
class FullRank(ByChannel):
    """``channel`` with one matrix instead of a projection of low rank.

    Ling 3.0: g = −most · σ(exp(a_n) · (W x + b)), W of N·K rows; without ``most``, −exp(a_n) · softplus(W x + b).

    Args:
        most: bound of −g, 5 in Ling: a token leaves at least 0.7 % of a channel; null for none
        least_step: shortest initial time step; the shorter, the longer a channel remembers
        most_step: longest initial time step
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int,
        most: Positive | None = None,
        least_step: Positive = SHORTEST,
        most_step: Positive = LONGEST,
    ) -> None:
        super().__init__(n_heads, head_dim, most, least_step, most_step)
        self.matrix = Linear(d_model, n_heads * head_dim, bias=False)

    def project(self, x: Tensor) -> Tensor:
        return self.matrix(x)

    def parallel_plan(self) -> dict[str, Placement]:
        return {**super().parallel_plan(), "matrix.weight": "column"}
