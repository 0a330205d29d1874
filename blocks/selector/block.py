from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Asked, Held, Selector, blocks_of, highest
from blockwright.blocks.selector.dsa import DSA, Candidates, Indexer, relu_scores
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("selector", "block")
class MoBA(Selector):
    """Mixture of block attention: each query head sees its own block and the blocks whose mean key suits it best.

    Lu et al. 2025 (MoBA), arXiv 2502.13189: with k̄_b the mean of the rotated keys of block b, query head n at token t
    sees, of the whole blocks before its own, those of the ``top_k`` − 1 highest q_tn · k̄_b, and its own block up to t.

    It has no parameters, and caches nothing: means are computed from the attention's keys; for ``mla`` from the mean
    latent, which gives the same. Blocks are counted from the start of each document.

    Args:
        block_size: tokens of a block; the paper has 512 at 8k tokens, 4096 at 1M
        top_k: blocks that a query sees, its own included
    """

    per_head = True
    conformance_settings: ClassVar[Mapping[str, Any]] = {"block_size": 3, "top_k": 2}

    def __init__(self, block_size: Count = 512, top_k: Count = 3) -> None:
        super().__init__()
        self.block_size, self.top_k = block_size, top_k

    def takes_all(self, n_keys: int) -> bool:
        return n_keys <= self.block_size * self.top_k

    @torch.no_grad()
    def forward(self, asked: Asked, held: Held) -> Tensor:
        T, blocks = asked.q.shape[1], blocks_of(held, self.block_size)
        own = blocks.own(T)
        if self.top_k == 1:
            return (own & held.seen)[:, None]
        keys = at_least_fp32(held.expand(blocks.mean(held.stored).to(held.stored.dtype)))
        queries = at_least_fp32(asked.q).unflatten(2, (keys.shape[2], -1))
        scores = torch.einsum("btkgh,bnkh->bkgtn", queries, keys).flatten(1, 2)
        possible = blocks.complete(T, own=False)[:, None]
        chosen = highest(scores.masked_fill(~possible, float("-inf")), self.top_k - 1) & possible
        return (blocks.spread(chosen) | own[:, None]) & held.seen[:, None]


@register("selector", "pooled")
class Pooled(Indexer):
    """An indexer over means of a few adjacent keys, which chooses whole blocks of tokens: QSA.

    As Qwen4-Exp's in transformers (no paper): with raw index keys r_s = W_k x_s, block b of ``block_size`` tokens from
    the start of the document and index heads j: k̄_b = rot(norm(mean of r in b)) at the position of its first token,
    q_j = rot(norm(W_q,j x)), I_tb = Σ_j relu(q_tj · k̄_b) / √I. A query sees the tokens of the ``top_k`` highest of the
    whole blocks up to itself, and those of the block that it is in while that is not whole. Equal scores go to the
    later block.

    GLM-5.3 pools by a learned softmax (``pooled_dsa``); MiniMax-M3 takes the highest score of 128 tokens, which is no
    block here. It caches I raw numbers of a token, and pools them again at each step. How Qwen4-Exp's indexer was
    trained is not published; here it learns as ``dsa`` does, from the attention's weights on whole blocks, summed over
    each.

    Args:
        n_heads: J, index heads
        head_dim: I, width of an index head
        block_size: tokens of a block
        top_k: blocks that a query sees
        dense: whether every query sees all tokens, while the indexer learns
        loss_weight: weight of the indexer's loss
        q_norm: norm of queries
        k_norm: norm of pooled keys
        position: rotates queries and pooled keys
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"n_heads": 2, "head_dim": 8, "block_size": 3, "top_k": 2}

    def __init__(
        self,
        d_model: int,
        attention_heads: int,
        q_norm: Norm,
        k_norm: Norm,
        position: Position,
        n_heads: Count = 32,
        head_dim: Count = 128,
        block_size: Count = 4,
        top_k: Count = 512,
        dense: bool = False,
        loss_weight: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.attention_heads = n_heads, head_dim, attention_heads
        self.block_size, self.top_k, self.dense, self.loss_weight = block_size, top_k, dense, loss_weight
        self.query = Linear(d_model, n_heads * head_dim, bias=False)
        self.key = Linear(d_model, head_dim, bias=False)
        self.q_norm, self.k_norm, self.position = q_norm, k_norm, position

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"head_dim": known["head_dim"]} if child == "position" else {"dim": known["head_dim"]}

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {"index": (self.head_dim,)}

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return (self.key(x.detach()),)

    def candidates(self, asked: Asked, held: Held) -> Candidates:
        raw, blocks = held.slots[0], blocks_of(held, self.block_size)
        pooled = self.k_norm(blocks.mean(raw).to(raw.dtype))[:, :, None]
        rows = max(len(held.positions), len(blocks.first))
        positions = held.positions.expand(rows, -1).gather(1, blocks.first.expand(rows, -1))
        return Candidates(self.position.rotate_in(pooled, pooled, positions, asked.declared)[0][:, :, 0], blocks)

    def scores(self, asked: Asked, keys: Tensor) -> Tensor:
        q = self.q_norm(self.query(asked.x).unflatten(-1, (self.n_heads, -1)))
        q = self.position.rotate_in(q, q, asked.positions, asked.declared)[0]
        return relu_scores(q, keys, torch.ones_like(q[..., 0]))


@register("selector", "pooled_dsa")
class PooledDSA(DSA):
    """``dsa`` over blocks of tokens, whose keys are means that each channel weights by a softmax over the block.

    GLM-5.3-Flash (Z.ai 2026), as in transformers (``Glm5NextTextIndexer``; no paper). Queries q_j, weights w_j and keys
    k_s are those of ``dsa``; with gates z_s = W_z x_s and a bias p_i for each place i in the block, block b of
    ``block_size`` tokens from the start of the document has k̄_b = Σ_i softmax_i(z_i + p_i) ⊙ k_i in each channel, and
    I_tb = Σ_j w_tj relu(q_tj · k̄_b) / √I. A query sees the tokens of the ``top_k`` highest of the whole blocks up to
    itself, and those of the block that it is in while that is not whole. Equal scores go to the later block.

    GLM-5.3 has no positions; where there are some, keys rotate before they are pooled. At the start z and p are 0, so
    that means are plain ones. It caches 2 I numbers of a token, and pools them again at each step.

    Args:
        block_size: tokens of a block
        top_k: blocks that a query sees
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"place": "table"}
    conformance_settings: ClassVar[Mapping[str, Any]] = {"n_heads": 2, "head_dim": 8, "block_size": 3, "top_k": 2}

    def __init__(
        self,
        d_model: int,
        latent_dim: int,
        attention_heads: int,
        k_norm: Norm,
        position: Position,
        n_heads: Count = 32,
        head_dim: Count = 128,
        rope_head_dim: Count | None = None,
        block_size: Count = 16,
        top_k: Count = 128,
        dense: bool = False,
        loss_weight: Positive = 1.0,
    ) -> None:
        sizes = n_heads, head_dim, rope_head_dim, top_k
        super().__init__(d_model, latent_dim, attention_heads, k_norm, position, *sizes, dense, loss_weight)
        self.block_size = block_size
        self.gate = Linear(d_model, head_dim, bias=False)
        self.place = nn.Parameter(torch.empty(block_size, head_dim))

    def reset_parameters(self) -> None:
        self.gate.weight.zero_()
        self.place.zero_()

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {**super().slots(), "gate": (self.head_dim,)}

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return (*super().remember(x, positions, declared), self.gate(x.detach()))

    def candidates(self, asked: Asked, held: Held) -> Candidates:
        keys, gates = held.slots
        blocks = blocks_of(held, self.block_size)
        weights = (at_least_fp32(blocks.members(gates)) + self.place).softmax(2)
        return Candidates((weights.to(keys.dtype) * blocks.members(keys)).sum(2), blocks)
