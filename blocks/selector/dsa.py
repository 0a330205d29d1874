from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.over_ranks import OverRanks, tokens_of
from blockwright.blocks.position.base import Position
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Asked, Blocks, Held, Selector, highest
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive

# --- what an indexer learns from: the attention's weights, and how far its own are from them ---


@torch.no_grad()
def attention_weights(q: Tensor, k: Tensor, scale: float, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weights of an attention, averaged over its heads.

    Args:
        q: [B,t,N,H]
        k: [B,S,K,H]; N is a multiple of K
        scale: multiplies q·k
        visible: [B|1,t,S]
        bias: [B|1,N|1,t,S] added to the scaled scores

    Returns:
        [B,t,S] in fp32 or more; those of a query that sees nothing are finite and mean nothing
    """
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = at_least_fp32(torch.einsum("btkgh,bskh->bkgts", grouped, k)).flatten(1, 2) * scale
    scores = scores if bias is None else scores + bias
    hidden = ~visible & visible.any(-1, keepdim=True)
    return scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1).mean(1)


def divergence(target: Tensor, scores: Tensor, possible: Tensor) -> Tensor:
    """Σ KL(p ‖ softmax scores) over queries, p the target made to sum to 1; queries without candidates count as 0.

    Args:
        target: [B,t,n], not negative
        scores: [B,t,n]
        possible: [B|1,t,n], the candidates over which both are distributions
    """
    any_possible = possible.any(-1, keepdim=True)
    target = target * possible
    p = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    log_s = scores.masked_fill(~possible & any_possible, float("-inf")).log_softmax(-1)
    return (torch.xlogy(p, p) - p * log_s.masked_fill(~possible, 0.0)).sum()


PAIRS = 2**25  # of a query, a candidate and a head whose scores are in memory at a time
TILE = 2**19  # of them that a CPU keeps in its cache from the product to the sum over heads


class Candidates(NamedTuple):
    """What can be chosen: tokens, or blocks of them.

    keys: [B,n,I]
    blocks: what the candidates are; None for tokens
    """

    keys: Tensor
    blocks: Blocks | None = None


def relu_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Scores of candidates, Σ_j w_j relu(q_j · k) / √I, in fp32 or more.

    Args:
        q: [B,T,J,I]
        keys: [B,n,I]
        weights: [B,T,J]

    Returns:
        [B,T,n]
    """
    J, width = q.shape[2:]
    rows, keys = at_least_fp32(q.flatten(1, 2)) * width**-0.5, at_least_fp32(keys)
    heads = at_least_fp32(weights)[:, :, None]

    def some(keys: Tensor) -> Tensor:
        return (heads @ (rows @ keys.mT).relu_().unflatten(1, (-1, J)))[:, :, 0]

    if keys.device.type != "cpu" or torch.is_grad_enabled():
        return some(keys)
    together = max(1, TILE // (len(rows) * rows.shape[1]))
    return torch.cat([some(part) for part in keys.split(together, 1)], -1)


class Indexer(OverRanks, Selector):
    """A selector with small queries and keys of its own, which learns to find what the attention looks at: the shared
    base of ``dsa``, ``pooled`` and ``pooled_dsa``. A subclass has ``candidates`` and their ``scores``.

    The choice has no gradient. It learns from KL(p ‖ softmax I) of each query, averaged over the queries: I are the
    scores of the candidates that it sees, p the attention's weights on these, which sum to 1 in each head, averaged
    over its heads (DeepSeek-AI 2025, arXiv 2512.02556, §2.1). Its inputs are detached, so that nothing but the selector
    follows this loss. Of long sequences the scores are computed for some queries at a time, and again for the gradient;
    the mask of T × S booleans is whole.
    """

    learns = True
    attention_heads: int
    n_heads: int
    top_k: int
    dense: bool
    loss_weight: float
    block_size: int = 1  # tokens of a candidate

    def candidates(self, asked: Asked, held: Held) -> Candidates:
        """What can be chosen, from all keys."""
        raise NotImplementedError

    def scores(self, asked: Asked, keys: Tensor) -> Tensor:
        """[B,T,n] in fp32 or more, of candidates' keys [B,n,I]."""
        raise NotImplementedError

    def takes_all(self, n_keys: int) -> bool:
        return self.dense or n_keys < self.block_size * (self.top_k + 1)

    @torch.no_grad()
    def forward(self, asked: Asked, held: Held) -> Tensor:
        keys, blocks = self.candidates(asked, held)
        chosen = []
        for rows in self.rows(asked, keys.shape[1]):
            possible = _possible(held, blocks, rows)
            scores = self.scores(asked.rows(rows), keys).masked_fill(~possible, float("-inf"))
            chosen.append(highest(scores, self.top_k) & possible)
        return (_tokens(torch.cat(chosen, 1), held, blocks) & held.seen)[:, None]

    def losses(
        self, asked: Asked, held: Held, chosen: Tensor | None, scale: float, bias: Tensor | None
    ) -> dict[str, Tensor]:
        x, latent, q = (t.detach() for t in asked[:3])
        asked, visible = asked._replace(x=x, latent=latent, q=q), held.seen if chosen is None else chosen[:, 0]
        with torch.no_grad():
            of_attention = held.expand(held.stored)
        keys, blocks = self.candidates(asked, held)

        def some(rows: slice) -> Tensor:
            own = None if bias is None else bias[:, :, rows]
            keys_seen, possible = visible[:, rows], visible[:, rows]
            if blocks is not None:
                possible = _possible(held, blocks, rows) & (blocks.total(keys_seen.float()) > 0)
                whole = blocks.spread(possible[:, None])[:, 0] & keys_seen
                keys_seen = torch.where(whole.any(-1, keepdim=True), whole, keys_seen)
            weights = attention_weights(q[:, rows], of_attention, scale, keys_seen, own)
            weights = weights if blocks is None else blocks.total(weights)
            some_asked = asked.rows(rows)
            if some_asked.real is not None:
                possible = possible & some_asked.real[..., None]
            return divergence(weights, self.scores(some_asked, keys), possible)

        every = list(self.rows(asked, of_attention.shape[1], q.shape[2]))
        if len(every) == 1:
            total = some(every[0])
        else:
            total = torch.stack([checkpoint(some, rows, use_reentrant=False) for rows in every]).sum()
        # Of each rank's heads where they are split: the sum over the ranks has the gradient of the mean over all heads.
        share = q.shape[2] / self.attention_heads
        mean = self.mean_of(total, tokens_of(x, asked.real).to(total.dtype))
        return {"index_kl": self.loss_weight * share * mean}

    def rows(self, asked: Asked, n: int, heads: int = 0) -> Iterator[slice]:
        """The queries whose scores of n candidates, and of so many other heads, are in memory at a time."""
        B, T = asked.x.shape[:2]
        size = max(1, PAIRS // (B * n * max(self.n_heads, heads)))
        return (slice(start, min(start + size, T)) for start in range(0, T, size))


def _possible(held: Held, blocks: Blocks | None, rows: slice) -> Tensor:
    """[B|1,t,n]: the candidates of some queries."""
    seen = held.seen
    return (seen if blocks is None else blocks.complete(seen.shape[1], own=True))[:, rows]


def _tokens(chosen: Tensor, held: Held, blocks: Blocks | None) -> Tensor:
    """Chosen candidates [B,T,n] → keys [B,T,S]: those of chosen blocks, and of a query's own block while it fills."""
    if blocks is None:
        return chosen
    T = chosen.shape[1]
    filling = blocks.own(T) & ~blocks.last[:, -T:, None]
    return blocks.spread(chosen[:, None])[:, 0] | filling


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


@register("selector", "shared")
class Shared(Selector):
    """Another selector in one layer of some, whose choice the layers above it reuse.

    IndexCache, arXiv 2603.12201; GLM-5.2: adjacent layers choose much alike, so most indexers can go. Layer l
    has a selector of its own where ``every`` divides l; any other sees what the nearest layer below chose, whichever
    selector that had: a layout with variants of ``selector`` gives other patterns. IndexCache also trains the layers
    that choose for those that reuse; here they learn from their own attention.

    It has no parameters beside the other's, and layers that reuse cache nothing for it. Where the choice is of each
    head, attentions have as many heads. A layer of multi-token prediction has none below it, and sees all keys if it
    has none of its own.

    Args:
        of: the selector
        every: layers to a selector
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "of": {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4},
        "every": 2,
    }

    def __init__(self, layer_idx: int, of: Selector, every: Count = 4) -> None:
        super().__init__()
        self.of = None if layer_idx % every else of
        self.reuses, self.learns, self.per_head = self.of is None, self.of is not None and of.learns, of.per_head

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {} if self.of is None else self.of.slots()

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return () if self.of is None else self.of.remember(x, positions, declared)

    def takes_all(self, n_keys: int) -> bool:
        return self.of is not None and self.of.takes_all(n_keys)

    def forward(self, asked: Asked, held: Held) -> Tensor | None:
        return held.before if self.of is None else self.of(asked, held)

    def losses(
        self, asked: Asked, held: Held, chosen: Tensor | None, scale: float, bias: Tensor | None
    ) -> dict[str, Tensor]:
        return {} if self.of is None else self.of.losses(asked, held, chosen, scale, bias)
