"""The contract of ``values``: change the values of an attention before they are cached and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.forward_pass import Carry
from blockwright.blocks.norm import Norm
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Fraction


@family("values")
class Values(Block):
    """A child of attention."""

    def drawn(self) -> Drawn:
        return Drawn(acts="values")

    def forward(self, v: Tensor, carry: Carry | None) -> Tensor:
        """Values [B,T,K,V] → [B,T,K,V]; ``carry`` as in blocks/forward_pass.py."""
        raise NotImplementedError


@register("values", "normed")
class Normed(Values):
    """Each head's values are normalised: v_g ← norm(v_g), over the H numbers of a head.

    Gemma 4, without a gain: ``norm: unit_rms``.

    Args:
        norm: of each head
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["head_dim"]}

    def forward(self, v: Tensor, carry: Carry | None) -> Tensor:
        normed: Tensor = self.norm(v)
        return normed


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
