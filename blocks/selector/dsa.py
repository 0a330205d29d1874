from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Asked, Held
from blockwright.blocks.selector.indexer import Candidates, Indexer, relu_scores
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive


@register("selector", "dsa")
class DSA(Indexer):
    """DeepSeek Sparse Attention: a light indexer scores every token, and each query sees the highest.

    DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv 2512.02556, §2.1. With index heads j of J, the attention's compressed query
    c (or x) and width I: q_j = rot(W_q,j c), k = rot(norm(W_k x)), w = W_w x / √J,
    I_ts = Σ_j w_tj relu(q_tj · k_s) / √I; query t sees the ``top_k`` tokens of highest I_ts, s ≤ t.

    Queries and keys rotate in their first dimensions, by this block's own ``position``: the released weights pair
    dimensions half-split there and interleaved in their attention. Scores are fp32. The released code also turns
    queries and keys by a Hadamard matrix and computes in FP8, for speed; the turn changes no score. Relu makes many
    scores exactly 0; which of them is chosen is left to the sort in other implementations, so that stepping and
    one pass may differ there. Here the later token is.

    It caches I numbers of a token. A position that biases scores does nothing here.

    Training has two stages in the paper: ``dense``, with all else frozen, at a rate of 1e-3 for 2.1B tokens, then all
    parameters, sparse, at 7.3e-6 for 944B. See ``experiment=dsa_warmup`` and docs/how-to/selectors.md.

    Args:
        n_heads: J, index heads
        head_dim: I, width of an index head
        rope_head_dim: width of the part that is rotated; null is half a head
        top_k: tokens that a query sees
        dense: whether every query sees all tokens, while the indexer learns (the first stage)
        loss_weight: weight of the indexer's loss
        k_norm: norm of the keys; a layernorm of eps 1e-6 in V3.2
        position: rotates queries and keys
    """

    # Small enough to leave tokens out.
    conformance_settings: ClassVar[Mapping[str, Any]] = {"n_heads": 2, "head_dim": 8, "top_k": 4}

    def __init__(
        self,
        d_model: int,
        latent_dim: int,
        attention_heads: int,
        k_norm: Norm,
        position: Position,
        n_heads: Count = 64,
        head_dim: Count = 128,
        rope_head_dim: Count | None = None,
        top_k: Count = 2048,
        dense: bool = False,
        loss_weight: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.rope = _rotated(head_dim, rope_head_dim)
        self.n_heads, self.head_dim, self.attention_heads = n_heads, head_dim, attention_heads
        self.top_k, self.dense, self.loss_weight = top_k, dense, loss_weight
        self.query = Linear(latent_dim, n_heads * head_dim, bias=False)
        self.key = Linear(d_model, head_dim, bias=False)
        self.weights = Linear(d_model, n_heads, bias=False)
        self.k_norm, self.position = k_norm, position

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        if child == "position":
            return {"head_dim": _rotated(known["head_dim"], known["rope_head_dim"])}
        return {"dim": known["head_dim"]}

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {"index": (self.head_dim,)}

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return (self._rotate(self.k_norm(self.key(x.detach()))[:, :, None], positions, declared)[:, :, 0],)

    def candidates(self, asked: Asked, held: Held) -> Candidates:
        return Candidates(held.slots[0])

    def scores(self, asked: Asked, keys: Tensor) -> Tensor:
        q = self._rotate(self.query(asked.latent).unflatten(-1, (self.n_heads, -1)), asked.positions, asked.declared)
        return relu_scores(q, keys, at_least_fp32(self.weights(asked.x)) * self.n_heads**-0.5)

    def _rotate(self, heads: Tensor, positions: Tensor, declared: int | Tensor) -> Tensor:
        """[B,T,·,I] with its first part rotated."""
        turning, rest = heads.split((self.rope, self.head_dim - self.rope), -1)
        return torch.cat((self.position.rotate_in(turning, turning, positions, declared)[0], rest), -1)


def _rotated(head_dim: int, rope: int | None) -> int:
    """Width of the rotated part.

    Raises:
        BlockError: it is wider than the head
    """
    rope = rope or max(2, head_dim // 4 * 2)
    if rope > head_dim:
        raise BlockError("rope_head_dim", rope, f"is a part of head_dim ({head_dim})", "Lower it, or widen the head")
    return rope
