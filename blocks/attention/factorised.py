from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.attention.base import even_heads
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
