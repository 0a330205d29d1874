from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import even_heads
from blockwright.blocks.attention.remembered import Memory
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Selector
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("attention", "differential")
class Differential(Scored):
    """Differential attention: the difference of two softmax maps, in which what both see by chance cancels.

    Ye et al. 2024, arXiv 2410.05258, with layers counted from 0:
        λ₀ = 0.8 − 0.6 exp(−0.3 layer), λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ₀
        y = W_o [(1 − λ₀) norm((softmax(q₁k₁ᵀ/√H) − λ softmax(q₂k₂ᵀ/√H)) v)]_n
    The norm is that of each head, over its 2·H values. The cache holds 2·D numbers per token.

    Args:
        n_heads: N, heads of two softmax maps each; H = D / 2N
        position: rotates queries and keys, or biases scores
        head_norm: of the difference, in each head
        selector: chooses which keys a query sees; null for none
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"factors": "vector"}

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        position: Position,
        head_norm: Norm,
        n_heads: Count = 4,
        selector: Selector | None = None,
    ) -> None:
        super().__init__(d_model)
        self.n_heads, self.head_dim = n_heads, even_heads(d_model, n_heads, 2)
        # A tensor, so that compiled layers share a graph. It stays on the CPU, and is no weight.
        self.start = torch.tensor(0.8 - 0.6 * math.exp(-0.3 * layer_idx), dtype=torch.float64, device="cpu")
        self.query, self.key, self.value, self.output = (Linear(d_model, d_model, bias=False) for _ in range(4))
        self.factors = nn.Parameter(torch.empty(4, self.head_dim))  # λ_q1, λ_k1, λ_q2, λ_k2
        self.position, self.head_norm, self.selector = position, head_norm, selector
        self.scale = position.softmax_scale / self.head_dim**0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        maps, width = 2 * known["n_heads"], even_heads(known["d_model"], known["n_heads"], 2)
        of_maps = super().child_context(child, {**known, "n_heads": maps})
        return {**of_maps, "head_dim": width, "n_heads": maps, "dim": 2 * width}

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        q, k = (W(x).unflatten(-1, (-1, self.head_dim)) for W in (self.query, self.key))
        q, k = given.rotated(self.position, q, k)
        v = self.value(x).unflatten(-1, (-1, 2 * self.head_dim))
        one, other = self.attend(x, given, q, {"k": k, "v": v}).unflatten(2, (-1, 2)).unbind(3)
        y = self.head_norm(one - self.share() * other).flatten(-2)
        return self.output((at_least_fp32(y) * (1 - self.start)).to(y.dtype))

    def share(self) -> Tensor:
        """λ, how much of the second map is subtracted."""
        q1, k1, q2, k2 = self.factors.to(torch.promote_types(self.factors.dtype, torch.float32))
        return ((q1 @ k1).exp() - (q2 @ k2).exp() + self.start).to(self.factors.dtype)

    def expand(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return held[0], held[1].repeat_interleave(2, 2)

    def memory(self) -> Memory:
        return {"k": [(2 * self.n_heads, self.head_dim)], "v": [(self.n_heads, 2 * self.head_dim)]}

    def parallel_plan(self) -> dict[str, Placement]:
        split: dict[str, Placement] = dict.fromkeys(("query.weight", "key.weight", "value.weight"), "column")
        return {**split, "output.weight": "row"}
