from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blocks.attention.base import (
    Attention,
    attend_in_parts,
    even_heads,
    reads_in_parts,
    rotated,
    score_bias,
    score_terms,
)
from blocks.attention.score_rows import ScoreRows
from blocks.attention.selecting import Losses, declared, remembered, selected
from blocks.base import Placement
from blocks.cache import Cache
from blocks.carry import Carry
from blocks.kernels.few_keys import PART, attend_few
from blocks.kernels.few_rows import by_mkl, reads_fast
from blocks.kernels.latent_attention import absorbs, into_latents, key_multiple, out_of_latents
from blocks.kernels.scoring import Scoring, Slopes, of_heads
from blocks.linear import Linear
from blocks.norm.base import Norm
from blocks.position.base import Position
from blocks.selector.base import Asked, Selector
from registry import register
from registry.ranges import Count

Choose = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None, Any], Any]

# Where queries are fewer than keys, bytes of all heads' keys and values
KEPT = 2**26  # that are kept for the gradient; more are expanded again
EXPANDED = 2**28  # that are expanded at a time


@register("attention", "mla")
class MLA(Attention):
    """Multi-head latent attention: keys and values are expanded from one small latent, the only thing cached.

    DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, §2.1. With heads n of N:
    [c; k_rope] = W_kv_down x, [k_n; v_n] = W_kv_up,n norm(c), [q_n; q_rope,n] = W_q,n x (or, compressed,
    W_q_up,n norm(W_q_down x)); k_n ← [k_n; rot(k_rope)], q_n ← [q_n; rot(q_rope,n)];
    y = W_o [softmax(q_n k_nᵀ / √(nope + rope)) v_n]_n.

    Position is decoupled: it rotates a separate part of each query and one key part shared by all heads, so the latent
    stays position-free. The norms on the two latents are in the paper's text but not in its equations, and in every
    released checkpoint. The order inside heads and projections is that of the checkpoints: [nope | rope],
    [latent | rope], [k | v]. With position blocks that do not rotate, the rope part is plain extra width.
    The cache holds C + R numbers per token, 4.5 heads' worth in the paper. Few new tokens on a long past are computed
    absorbed (the paper's appendix C; blocks/kernels/latent_attention.py): W_kv_up is folded into query and output, and
    nothing is expanded. Many are computed as in the formula, expanding the cached latents each time, some heads at a
    time if the keys are many more.

    Args:
        n_heads: N, heads
        kv_lora_rank: C, width of the key-value latent; null is 4 head widths, the paper's ratio
        q_lora_rank: width of the query latent; null leaves queries uncompressed, as in V2-Lite
        qk_nope_head_dim: width of a head's part without position; null is d_model / n_heads
        qk_rope_head_dim: R, width of a head's part with position; null is half a head width, the paper's ratio
        v_head_dim: width of a head's value; null is d_model / n_heads
        q_norm: norm of the query latent, used with q_lora_rank
        kv_norm: norm of the key-value latent
        position: rotates the rope parts, or biases scores
        selector: chooses which keys a query sees; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

    def __init__(
        self,
        d_model: int,
        position: Position,
        q_norm: Norm,
        kv_norm: Norm,
        n_heads: Count = 8,
        kv_lora_rank: Count | None = None,
        q_lora_rank: Count | None = None,
        qk_nope_head_dim: Count | None = None,
        qk_rope_head_dim: Count | None = None,
        v_head_dim: Count | None = None,
        selector: Selector | None = None,
    ) -> None:
        super().__init__()
        widths = _widths(d_model, n_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank)
        self.n_heads, self.position, self.kv_norm, self.selector = n_heads, position, kv_norm, selector
        self.nope, self.rope, self.v_head_dim, self.latent = widths
        queries = n_heads * (self.nope + self.rope)
        if q_lora_rank is None:
            self.query: nn.Module = Linear(d_model, queries, bias=False)
        else:
            down, up = Linear(d_model, q_lora_rank, bias=False), Linear(q_lora_rank, queries, bias=False)
            self.query = nn.Sequential(down, q_norm, up)
        self.kv_down = Linear(d_model, self.latent + self.rope, bias=False)
        self.kv_up = Linear(self.latent, n_heads * (self.nope + self.v_head_dim), bias=False)
        self.output = Linear(n_heads * self.v_head_dim, d_model, bias=False)
        self.scale = position.softmax_scale / (self.nope + self.rope) ** 0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        given = ("d_model", "n_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        _nope, rope, _value, latent = _widths(*(known[name] for name in given))
        if child == "selector":
            return {"latent_dim": known["q_lora_rank"] or known["d_model"], "attention_heads": known["n_heads"]}
        norms = {"q_norm": known["q_lora_rank"] or 1, "kv_norm": latent}
        return {"dim": norms[child]} if child in norms else {"head_dim": rope}

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        losses: Losses | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        compressed, queries = self._queries(x)
        q_nope, q_rope = queries.unflatten(-1, (-1, self.nope + self.rope)).split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_down(x).split((self.latent, self.rope), -1)
        q_rope, k_rope = rotated(self.position, q_rope, k_rope[:, :, None], positions, cache)
        latent = self.kv_norm(latent)
        index = remembered(self.selector, x, positions, cache)
        choose = partial(self._choose, x, compressed, (q_nope, q_rope), positions, cache, (losses, carry))
        if cache is not None:
            new = torch.cat((latent, k_rope[:, :, 0]), -1)
            y = self._remembering(q_nope, q_rope, (new, *index), positions, cache, choose)
        else:
            bias, segments = score_terms(self.position, positions, segments, None)
            bias = choose((latent, k_rope[:, :, 0]), index, segments, bias)
            y = self._expanded(q_nope, q_rope, latent, k_rope, bias, segments)
        return self.output(y.flatten(-2))

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What queries are made from, [B,T,L], and the queries, [B,T,N·(nope+R)]."""
        if not isinstance(self.query, nn.Sequential):
            return x, self.query(x)
        compressed = self.query[1](self.query[0](x))
        return compressed, self.query[2](compressed)

    def _split(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored, [B,S,C+R] → [B,S,C] and [B,S,1,R]."""
        latent, k_rope = stored.split((self.latent, self.rope), -1)
        return latent, k_rope[:, :, None]

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        bias: Tensor | Slopes | None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Attention over keys and values expanded from latents [B,S,C] and k_rope [B,S,1,R] → [B,T,N,V].

        For few queries on many keys all heads' keys and values would outgrow the rest of a layer: they are expanded for
        some heads at a time, and again for the gradient.
        """
        N = q_nope.shape[2]
        a_head = latent[..., :1].numel() * (self.nope + self.rope + self.v_head_dim) * latent.element_size()
        if q_nope.shape[1] == latent.shape[1] or N * a_head <= KEPT or not isinstance(self.kv_up, nn.Linear):
            return self._attend(q_nope, q_rope, k_rope, self.kv_up(latent), bias, segments)

        def some(weight: Tensor, q_nope: Tensor, q_rope: Tensor, bias: Tensor | Slopes | None) -> Tensor:
            return self._attend(q_nope, q_rope, k_rope, F.linear(latent, weight), bias, segments)

        together = heads_together(N, a_head)
        weights = self.kv_up.weight.unflatten(0, (N, -1))
        parts = [slice(n, n + together) for n in range(0, N, together)]
        given = [
            (weights[p].flatten(0, 1), q_nope[:, :, p], q_rope[:, :, p], None if bias is None else of_heads(bias, p))
            for p in parts
        ]
        return torch.cat([checkpoint(some, *each, use_reentrant=False, preserve_rng_state=False) for each in given], 2)

    def _attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        k_rope: Tensor,
        expanded: Tensor,
        bias: Tensor | Slopes | None,
        segments: Tensor | None,
    ) -> Tensor:
        """Attention over keys and values [B,S,N·(nope+V)] of N heads → [B,T,N,V]."""
        q, (k, v) = torch.cat((q_nope, q_rope), -1), self._keys_and_values(expanded, k_rope)
        return self.kernels.attend(q, k, v, Scoring(self.scale, bias, segments))

    def _keys_and_values(self, expanded: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """[B,S,N·(nope+V)] and [B,S,1,R] → [B,S,N,nope+R] and [B,S,N,V]."""
        k_nope, v = expanded.unflatten(-1, (-1, self.nope + self.v_head_dim)).split((self.nope, self.v_head_dim), -1)
        return torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), -1), v

    def _remembering(
        self, q_nope: Tensor, q_rope: Tensor, new: tuple[Tensor, ...], positions: Tensor, cache: Cache, choose: Choose
    ) -> Tensor:
        """Attention over a cache and what is stored of the new tokens, [B,T,C+R] first, the cheaper way."""
        T, S = q_nope.shape[1], cache.length + q_nope.shape[1]
        wrapped = not isinstance(self.kv_up, nn.Linear)  # by another library, which has no weight to absorb
        absorbing = not (wrapped or cache.spread) and absorbs(T, S, self.latent, self.rope, self.nope, self.v_head_dim)
        dense = self.selector is None or self.selector.takes_all(S)
        if not absorbing and dense and reads_in_parts(self.kernels, cache, T):
            q = torch.cat((q_nope, q_rope), -1)
            read = partial(self._read, cache)
            return attend_in_parts(self.position, positions, cache, q, new, self.scale, read)
        if not absorbing:
            stored, *index = cache.append(*new)
            bias, segments = score_terms(self.position, positions, None, cache)
            bias = choose((stored,), tuple(index), segments, bias)
            y = None if dense or wrapped or cache.spread else self._on_few(q_nope, q_rope, stored, bias)
            return self._expanded(q_nope, q_rope, *self._split(stored), bias, segments) if y is None else y
        memory, *index = cache.append(*new, multiple=key_multiple(q_nope.dtype, q_nope.device))
        bias = score_bias(self.position, positions, cache)
        bias = choose((memory[:, :S],), tuple(t[:, :S] for t in index), None, bias)
        y = None if dense else self._on_few(q_nope, q_rope, memory[:, :S], bias)
        if y is not None:
            return y
        key_up, value_up = self._ups()
        with by_mkl() if T == 1 and reads_fast(q_nope) else nullcontext():
            q = torch.cat((into_latents(q_nope, key_up), q_rope), -1)
            y = self.kernels.attend_latents(q, memory, S, self.latent, self.scale, bias)
            return out_of_latents(y, value_up)

    def _on_few(self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, bias: Tensor | Slopes | None) -> Tensor | None:
        """Attention, absorbed, to the keys that the selector leaves, [B,T,N,V]; None where they are not few."""
        if not isinstance(bias, Tensor):
            return None
        key_up, value_up = self._ups()

        def attend(q: Tensor, stored: tuple[Tensor, ...], bias: Tensor) -> Tensor:
            return self.kernels.attend_latents(q, stored[0], stored[0].shape[1], self.latent, self.scale, bias)

        y = attend_few(attend, torch.cat((into_latents(q_nope, key_up), q_rope), -1), (memory,), bias, PART)
        return None if y is None else out_of_latents(y, value_up)

    def _ups(self) -> tuple[Tensor, Tensor]:
        """The heads' key and value matrices, [N,nope,C] and [N,V,C]."""
        by_head = self.kv_up.weight.unflatten(0, (self.n_heads, -1))
        return by_head[:, : self.nope], by_head[:, self.nope :]

    def _choose(
        self,
        x: Tensor,
        compressed: Tensor,
        q: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: Cache | None,
        left: tuple[Losses | None, Carry | None],
        stored: tuple[Tensor, ...],
        index: tuple[Tensor, ...],
        segments: Tensor | None,
        bias: Any,
    ) -> Any:
        """The bias with what the selector hides; as it is without one. Queries and what is stored come in parts."""
        if self.selector is None:
            return bias
        asked = Asked(x, compressed, torch.cat(q, -1), positions, declared(positions, cache))
        held = torch.cat(stored, -1) if len(stored) > 1 else stored[0], self._expand, index, segments, cache
        return selected(self.selector, asked, *held, bias, self.scale, *left)

    def _expand(self, stored: Tensor) -> Tensor:
        """Keys [B,n,N,nope+R] of what is stored, or of averages of it."""
        latent, k_rope = self._split(stored)
        return self._keys_and_values(self.kv_up(latent), k_rope)[0]

    def _read(self, cache: Cache, tokens: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens of a cache, expanded."""
        latent, k_rope = self._split(cache.read(tokens)[0])
        return self._keys_and_values(self.kv_up(latent), k_rope)

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        apart = (self.latent, self.rope)  # rotated keys differ in scale from normalised latents
        slots: dict[str, tuple[int, ...]] = {"latent": (sum(apart),)}
        slots |= {} if self.selector is None else self.selector.slots()
        return Cache(batch, length, slots, dtype, device, bits=bits, parts={"latent": apart})

    def score_rows(self) -> tuple[ScoreRows, ...]:
        query = "query.weight" if isinstance(self.query, nn.Linear) else "query.2.weight"
        height, content = self.nope + self.rope, slice(0, self.nope)
        return (
            ScoreRows(query, height, "query", content),
            ScoreRows(query, height, "alone", slice(self.nope, height)),  # its key is shared by all heads
            ScoreRows("kv_up.weight", self.nope + self.v_head_dim, "key", content),
        )

    def parallel_plan(self) -> dict[str, Placement]:
        query: dict[str, Placement] = {"query.weight": "column"}
        if not isinstance(self.query, nn.Linear):
            query = {"query.0.weight": "replicate", "query.2.weight": "column"}
        return {**query, "kv_down.weight": "replicate", "kv_up.weight": "column", "output.weight": "row"}


def heads_together(n_heads: int, a_head: int) -> int:
    """The most heads, a divisor of all, whose keys and values of ``a_head`` bytes each fit ``EXPANDED``; at least 1."""
    return max(n for n in range(1, n_heads + 1) if n_heads % n == 0 and (n == 1 or n * a_head <= EXPANDED))


def _widths(
    d_model: int, n_heads: int, nope: int | None, rope: int | None, value: int | None, latent: int | None
) -> tuple[int, int, int, int]:
    """The four widths; those not given follow the paper's ratios to a head of d_model / n_heads."""
    if nope and rope and value and latent:
        return nope, rope, value, latent
    head = even_heads(d_model, n_heads)
    return nope or head, rope or max(2, head // 4 * 2), value or head, latent or 4 * head
