from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm.rmsnorm import RMSNorm
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("norm", "gated")
class Gated(RMSNorm):
    """A root-mean-square norm gated by its own result, through a projection of low rank.

    A.X-K2: n = x / sqrt(mean(x²) + eps) · g; y = n ⊙ σ(W_up silu(W_down n)).

    Args:
        eps: added to the mean square
        rank: width of W_down n; 16 in A.X-K2
    """

    def __init__(self, dim: int, eps: Positive = 1e-6, rank: Count = 16) -> None:
        super().__init__(dim, eps)
        self.down, self.up = Linear(dim, rank, bias=False), Linear(rank, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.up(F.silu(self.down(y))).sigmoid()

    def parallel_plan(self) -> dict[str, Placement]:
        return {**super().parallel_plan(), "down.weight": "replicate", "up.weight": "replicate"}
