from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Placement
from blockwright.blocks.carry import Carry
from blockwright.blocks.values.base import Values
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Fraction

NAME = "values"  # of the first layer's, in ``carry``


@register("values", "value_residual")
class ValueResidual(Values):
    """Every layer's values are mixed with those of the first layer.

    Zhou et al. 2024 (ResFormer), arXiv 2410.17897, with learned factors: v_l ← λ₁ v_l + λ₂ v_1. The first layer that
    has this block mixes its values with themselves, so that all layers are alike; the paper's leaves them alone. What
    is cached is mixed. For attentions that cache values: ``mla`` caches latents.

    Args:
        first: λ₂ at the start; λ₁ is 1 − first

    Raises:
        BlockError: the first layer's values have another shape than this layer's
    """

    def __init__(self, first: Fraction = 0.5) -> None:
        super().__init__()
        self.first = first
        self.factors = nn.Parameter(torch.empty(2))

    def reset_parameters(self) -> None:
        self.factors.copy_(torch.tensor((1 - self.first, self.first), dtype=torch.float32))

    def forward(self, v: Tensor, carry: Carry | None) -> Tensor:
        first = v if carry is None else carry.setdefault(NAME, v)
        if first.shape != v.shape:
            rule = f"mixes values of {tuple(v.shape[2:])} with the first layer's, of {tuple(first.shape[2:])}"
            remedy = "Give all attentions as many KV heads, or set values: null in the variant that differs"
            raise BlockError("values", "value_residual", rule, remedy)
        own, other = self.factors.to(v.dtype)
        return own * v + other * first

    def parallel_plan(self) -> dict[str, Placement]:
        return {"factors": "replicate"}
