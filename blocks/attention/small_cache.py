"""Attentions with few numbers a token in the cache: keys tied to values, or keys and values of few factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.attention.base import check_groups, even_heads, rotated_part
from blockwright.blocks.attention.remembered import Memory
from blockwright.blocks.attention.scored import Changes, Scored
from blockwright.blocks.base import Placement
from blockwright.blocks.convolution import convolved
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("attention", "grouped_tied")
class GroupedTied(Scored):
    """Grouped tied attention: only values are remembered, and a part of each is the unrotated part of its key.

    Zadouri et al. 2025, arXiv 2505.21664 (GTA): t_g = W_t,g x, r = rotate(W_r x); k_g = [t_g,1:H−R; r] and v_g = t_g,
    with g = ⌊n K/N⌋; y = W_o [softmax(q_n k_gᵀ/√H) v_g]_n. Of a query the last R are rotated. The cache holds K·H + R
    numbers per token, about half of ``gqa``.

    Args:
        n_heads: N, query heads
        n_kv_heads: K, tied heads; divides n_heads
        rope_head_dim: R, rotated part of a head; null is half, as in the paper, or the even number below
        position: rotates half of queries and keys, or biases scores
    """

    def __init__(
        self,
        d_model: int,
        position: Position,
        n_heads: Count = 8,
        n_kv_heads: Count = 2,
        rope_head_dim: Count | None = None,
        changes: Changes = Changes(),
    ) -> None:
        super().__init__(d_model)
        check_groups(n_heads, n_kv_heads)
        self.head_dim, self.n_kv_heads = even_heads(d_model, n_heads), n_kv_heads
        self.rope = rotated_part(self.head_dim, rope_head_dim)
        self.query = Linear(d_model, d_model, bias=False)
        self.output = Linear(changes.left(n_heads) * self.head_dim, d_model, bias=False)
        self.tied = Linear(d_model, n_kv_heads * self.head_dim, bias=False) if changes.makes else None
        self.rotating = Linear(d_model, self.rope, bias=False) if changes.makes else None
        self.take(position, changes)
        self.scale = position.softmax_scale / self.head_dim**0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        found = super().child_context(child, known)
        rope = rotated_part(found["head_dim"], known["rope_head_dim"])
        return {**found, "head_dim": rope} if child == "position" else found

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        q = convolved(self.query_conv, self.query(x), given).unflatten(-1, (-1, self.head_dim))
        still, turning = q.split((self.head_dim - self.rope, self.rope), -1)
        if self.tied is None or self.rotating is None:  # it borrows
            turning, _ = given.rotated(self.position, turning, turning[:, :, :0])
            return self.output(self.attend(x, given, torch.cat((still, turning), -1), {}).flatten(-2))
        turning, r = given.rotated(self.position, turning, self.rotating(x)[:, :, None])
        y = self.attend(x, given, torch.cat((still, turning), -1), {"tied": (self.tied(x), r.squeeze(2))})
        return self.output(y.flatten(-2))

    def expand(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        tied, r = held[0].unflatten(-1, (-1, self.head_dim)), held[1][:, :, None]
        return torch.cat((tied[..., : -self.rope], r.expand(-1, -1, tied.shape[2], -1)), -1), tied

    def memory(self) -> Memory:
        return {"tied": [(self.n_kv_heads * self.head_dim,), (self.rope,)]}

    def parallel_plan(self) -> dict[str, Placement]:
        made: dict[str, Placement] = {} if self.tied is None else {"tied.weight": "column"}
        return {"query.weight": "column", **made, "output.weight": "row"}


@register("attention", "factorised")
class Factorised(Scored):
    """Multi-matrix factorisation attention: many wide query heads from one latent, and one head of keys and values.

    Hu et al. 2024, arXiv 2412.19255 (MFA); Step-3, arXiv 2507.19427: c = norm(W_d x), q_n = W_u,n c, k = W_k x,
    v = W_v x; y = W_o [softmax(q_n kᵀ/√H) v]_n. Factorised queries afford more and wider heads. The cache holds 2·H
    numbers per token, as that of ``mqa``.

    Args:
        n_heads: N, query heads
        head_dim: H, width of a head; null is 2 · d_model / n_heads
        q_lora_rank: width of c; null is d_model / 4
        position: rotates queries and keys, or biases scores
        q_norm: norm of c
    """

    def __init__(
        self,
        d_model: int,
        position: Position,
        q_norm: Norm,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        q_lora_rank: Count | None = None,
        changes: Changes = Changes(),
    ) -> None:
        super().__init__(d_model)
        self.head_dim, latent = _widths(d_model, n_heads, head_dim, q_lora_rank)
        self.down = Linear(d_model, latent, bias=False)
        self.up_query = Linear(latent, n_heads * self.head_dim, bias=False)
        makes, head = changes.makes, self.head_dim
        self.key, self.value = (Linear(d_model, head, bias=False) if makes else None for _ in range(2))
        self.output = Linear(changes.left(n_heads) * head, d_model, bias=False)
        self.take(position, changes)
        self.q_norm = q_norm
        self.scale = position.softmax_scale / self.head_dim**0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        H, latent = _widths(*(known[name] for name in ("d_model", "n_heads", "head_dim", "q_lora_rank")))
        context = super().child_context(child, {**known, "head_dim": H})
        return {**context, "dim": latent} if child == "q_norm" else {**context, "latent_dim": latent, "n_kv_heads": 1}

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        latent = self.q_norm(self.down(x))
        q = convolved(self.query_conv, self.up_query(latent), given).unflatten(-1, (-1, self.head_dim))
        if self.key is None or self.value is None:  # it borrows
            q, _ = given.rotated(self.position, q, q[:, :, :0])
            return self.output(self.attend(x, given, q, {}, latent).flatten(-2))
        k, v = self.key(x)[:, :, None], self.value(x)[:, :, None]
        q, k = given.rotated(self.position, q, k)
        return self.output(self.attend(x, given, q, {"k": k, "v": v}, latent).flatten(-2))

    def memory(self) -> Memory:
        return {"k": [(1, self.head_dim)], "v": [(1, self.head_dim)]}

    def parallel_plan(self) -> dict[str, Placement]:
        return {"up_query.weight": "column", "output.weight": "row"}


def _widths(d_model: int, n_heads: int, head_dim: int | None, latent: int | None) -> tuple[int, int]:
    return head_dim or 2 * even_heads(d_model, n_heads), latent or max(1, d_model // 4)
