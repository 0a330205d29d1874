from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blocks.attention.base import Attention, even_heads
from blocks.attention.selecting import Losses, declared
from blocks.base import Placement
from blocks.cache import Cache
from blocks.compressor.base import Compressor, Entries
from blocks.compressor.cache import WindowedCache
from blocks.kernels.documents import is_real
from blocks.kernels.few_keys import few, pieces, taken
from blocks.kernels.scoring import Scoring, dense
from blocks.linear import Linear
from blocks.norm.base import Norm
from blocks.position.base import Position
from blocks.scores.base import Scores
from blocks.selector.base import Asked
from registry import BlockError, register
from registry.ranges import Count

ROWS = 256  # queries whose scores are in memory at a time


@register("attention", "shared_kv")
class SharedKV(Attention):
    """One head that is key and value at once, for the last tokens and for means of all others.

    DeepSeek-AI 2026 (DeepSeek-V4), §2.3. With heads n of N: c = norm(W_q_down x), q_n = rot(norm(W_q_up,n c)),
    k = rot(norm(W_kv x)). A query sees the k of the last ``window`` tokens and the keys of its ``compressor``, in one
    softmax; y_n = rot⁻¹(Σ_j w_nj k_j): since values are rotated too, their sum is turned back by the query's position,
    which leaves distances. Heads are joined in groups: y = W_o [W_g (y_n)_n∈g]_g.

    The last ``rope_head_dim`` dimensions are rotated, of the compressor's keys by the position of their first token.
    Released: ``csa`` and ``hca`` in turn, no compressor in Flash's first two layers, and learned ``sinks``. The cache
    has ``window`` keys, the unfinished windows, and a key of each closed one. Some queries at a time are computed,
    against their window and the compressor's keys alone; where ``csa`` chooses few of these and nothing needs a
    gradient, against the chosen ones. An amplitude of ``yarn`` acts on the turned part of the sum too: V4 has none
    (mscale 0).

    Args:
        n_heads: N, query heads
        head_dim: H, width of a head; null is d_model / n_heads
        rope_head_dim: R, width of a head's last part, which is rotated; null is half a head
        q_lora_rank: width of the query latent; null is d_model / 4
        window: number of last tokens a query sees, itself included
        n_groups: groups of heads at the output; divides n_heads
        o_lora_rank: width to which a group is brought before groups are joined; null is d_model / n_groups
        q_norm: norm of the query latent
        query_norm: norm of each query head; ``unit_rms`` in DeepSeek-V4
        kv_norm: norm of the key
        position: rotates, or biases scores
        compressor: makes keys of windows of tokens; null for none
        scores: replaces the plain softmax; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)
    conformance_settings: ClassVar[Mapping[str, Any]] = {"window": 4, "n_heads": 4, "n_groups": 2}

    def __init__(
        self,
        d_model: int,
        position: Position,
        q_norm: Norm,
        query_norm: Norm,
        kv_norm: Norm,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        rope_head_dim: Count | None = None,
        q_lora_rank: Count | None = None,
        window: Count = 128,
        n_groups: Count = 1,
        o_lora_rank: Count | None = None,
        compressor: Compressor | None = None,
        scores: Scores | None = None,
    ) -> None:
        super().__init__()
        H, self.rope, latent = _widths(d_model, n_heads, head_dim, rope_head_dim, q_lora_rank)
        if n_heads % n_groups:
            rule = f"must divide n_heads ({n_heads})"
            raise BlockError("n_groups", n_groups, rule, "Use 1 for all heads in one group")
        self.n_heads, self.head_dim, self.window, self.n_groups = n_heads, H, window, n_groups
        together = o_lora_rank or -(-d_model // n_groups)
        self.q_down = Linear(d_model, latent, bias=False)
        self.q_up = Linear(latent, n_heads * H, bias=False)
        self.kv = Linear(d_model, H, bias=False)
        self.group = nn.Parameter(torch.empty(n_groups, together, n_heads // n_groups * H))
        self.output = Linear(n_groups * together, d_model, bias=False)
        self.q_norm, self.query_norm, self.kv_norm, self.position = q_norm, query_norm, kv_norm, position
        self.compressor, self.scores = compressor, scores
        self.scale = position.softmax_scale / H**0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        given = ("d_model", "n_heads", "head_dim", "rope_head_dim", "q_lora_rank")
        H, rope, latent = _widths(*(known[name] for name in given))
        if child == "compressor":
            return {"kv_dim": H, "rope_dim": rope, "latent_dim": latent, "attention_heads": known["n_heads"]}
        norms = {"q_norm": latent, "query_norm": H, "kv_norm": H}
        return {"dim": norms[child]} if child in norms else {"head_dim": rope}

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        losses: Losses | None = None,
    ) -> Tensor:
        held = _windowed(cache)
        latent, length = self.q_norm(self.q_down(x)), declared(positions, held)
        rotate = partial(self._rotated, length=length)
        q = self.query_norm(self.q_up(latent).unflatten(-1, (self.n_heads, -1)))
        q = rotate(q, positions, which=0)
        k = rotate(self.kv_norm(self.kv(x))[:, :, None], positions)
        near = Near(k, positions, torch.arange(x.shape[1], device=x.device), segments, None)
        near = near if held is None else self._remembered(held, k)
        entries = None
        if self.compressor is not None:
            real = None if segments is None else is_real(segments)
            asked = Asked(x, latent, q, positions, length, real=real)
            entries = self.compressor(asked, segments, held, self.scale, rotate, losses)
        y = rotate(self._attended(q, positions, near, entries), -positions)
        y = y.flatten(-2).unflatten(-1, (self.n_groups, -1))
        return self.output(torch.einsum("btgh,glh->btgl", y, self.group.to(y.dtype)).flatten(-2))

    def _rotated(self, heads: Tensor, positions: Tensor, length: int, which: int = 1) -> Tensor:
        """[B,T,·,W] with its last part rotated, as keys are (1) or as queries are (0)."""
        rest, turning = heads.split((heads.shape[-1] - self.rope, self.rope), -1)
        return torch.cat((rest, self.position.rotate_in(turning, turning, positions, length)[which]), -1)

    @staticmethod
    def _remembered(held: WindowedCache, k: Tensor) -> Near:
        keys, index = held.remember(k)
        places = index[None] if held.padding is None else (index - held.padding[:, None]).clamp(min=0)
        return Near(keys, places, index, None, held.padding)

    def _attended(self, q: Tensor, positions: Tensor, near: Near, entries: Entries | None) -> Tensor:
        """Some queries at a time, each on its window and on all entries: [B,T,N,H]."""
        T, parts = q.shape[1], []
        for start in range(0, T, ROWS):
            rows, own = slice(start, min(start + ROWS, T)), near.before(T, start, min(start + ROWS, T), self.window)
            some, at = q[:, rows], positions[:, rows]
            sources = [Source(own.seen(rows.stop - start, self.window), own.keys, own.positions)]
            if entries is not None:
                chosen = entries.seen(rows)
                first = slice(0, chosen.shape[-1])
                sources.insert(0, Source(chosen, entries.keys[:, first, None], entries.positions[:, first]))
                if (index := few(chosen)) is not None:
                    parts.append(self._on_few(some, at, sources, index))
                    continue
            parts.append(self._on_all(some, at, sources))
        return torch.cat(parts, 1)

    def _on_few(self, q: Tensor, positions: Tensor, sources: Sequence[Source], index: Tensor) -> Tensor:
        """Attention of each query to its own keys, gathered: chosen ones by their indices [B|1,t,K], and its window."""
        (B, t), device, parts = q.shape[:2], q.device, []
        S, width = sources[1].seen.shape[-1], min(sources[1].seen.shape[-1], self.window)
        first = torch.arange(S - t - width + 1, S - width + 1, device=device).clamp(min=0)  # up to the query's own key
        window = (first[:, None] + torch.arange(width, device=device))[None]
        a_query = B * (index.shape[-1] + width) * self.head_dim * q.element_size()
        for rows in pieces(t, a_query, device):
            own = [
                each.some(rows).taken(at[:, rows].expand(B, -1, -1))
                for each, at in zip(sources, (index, window), strict=True)
            ]
            places = positions[:, rows].expand(B, -1).reshape(-1, 1)
            y = self._on_all(q[:, rows].flatten(0, 1)[:, None], places, own)
            parts.append(y[:, 0].unflatten(0, (B, -1)))
        return torch.cat(parts, 1)

    def _on_all(self, q: Tensor, positions: Tensor, sources: Sequence[Source]) -> Tensor:
        """Attention of some queries to all keys of the sources, of which each sees some."""
        seen = torch.cat(_alike(*(each.seen for each in sources)), -1)
        keys = torch.cat([each.keys for each in sources], 1)
        places = torch.cat(_alike(*(each.positions for each in sources)), -1)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))[:, None]
        far = dense(self.position.bias(positions, places))
        scoring = Scoring(self.scale, bias if far is None else bias + far)
        return (self.scores or self.kernels.attend)(q, keys, keys, scoring)

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> WindowedCache:
        """As in the contract; ``bits`` are ignored: what is kept are few keys, most of them means of many tokens."""
        held = {} if self.compressor is None else self.compressor.held()
        every = 1 if self.compressor is None else self.compressor.every
        return WindowedCache(batch, length, self.window, self.head_dim, every, held, dtype, device)

    def parallel_plan(self) -> dict[str, Placement]:
        maps = ("q_down.weight", "q_up.weight", "kv.weight", "group", "output.weight")
        return dict.fromkeys(maps, "replicate")


class Near(NamedTuple):
    """Keys of the last tokens, the queries' own last.

    keys: [B,S,1,H]
    positions: [B|1,S]
    at: [S], indices in their rows; of one query in any order
    segments: [B,S], their documents; None: each row is one
    padding: [B], tokens of padding at the start of each row; None for none
    """

    keys: Tensor
    positions: Tensor
    at: Tensor
    segments: Tensor | None
    padding: Tensor | None

    def before(self, T: int, start: int, stop: int, window: int) -> Near:
        """What the queries from ``start`` to ``stop`` of T see some of, their own keys last."""
        first = self.keys.shape[1] - T
        keys = slice(max(0, first + start - window + 1), first + stop)
        segments = None if self.segments is None else self.segments[:, keys]
        return Near(self.keys[:, keys], self.positions[:, keys], self.at[keys], segments, self.padding)

    def seen(self, n_queries: int, window: int) -> Tensor:
        """[B|1,t,S]: whether each of the last queries sees a key. Padding sees padding, so that it sees something."""
        last = self.at.max() if n_queries == 1 else self.at[-1]
        query = (last - torch.arange(n_queries - 1, -1, -1, device=self.at.device))[:, None]
        seen = ((self.at <= query) & (self.at > query - window))[None]
        if self.segments is not None:
            seen = seen & (self.segments[:, -n_queries:, None] == self.segments[:, None])
        if self.padding is not None:
            first = self.padding[:, None, None]
            seen = seen & ((self.at >= first) | (query < first))
        return seen


class Source(NamedTuple):
    """Keys of one kind.

    seen: [B|1,t,S], whether some queries see them
    keys: [B,S,1,H]
    positions: [B|1,S]
    """

    seen: Tensor
    keys: Tensor
    positions: Tensor

    def some(self, rows: slice) -> Source:
        """The same keys for some of the queries."""
        return self._replace(seen=self.seen[:, rows])

    def taken(self, index: Tensor) -> Source:
        """The keys of indices [B,t,K], those of each query as a row: B·t of them."""
        seen = self.seen.expand(*index.shape[:2], -1).gather(-1, index).flatten(0, 1)[:, None]
        return Source(seen, taken(self.keys, index), taken(self.positions, index))


def _windowed(cache: Cache | None) -> WindowedCache | None:
    """The cache that ``new_cache`` makes.

    Raises:
        BlockError: another one
    """
    if cache is None or isinstance(cache, WindowedCache):
        return cache
    rule = "shared_kv keeps means of windows, which this cache does not hold"
    raise BlockError("cache", type(cache).__name__, rule, "Use the attention's new_cache")


def _alike(*parts: Tensor) -> list[Tensor]:
    """[B|1,…] of each, expanded to the larger number of rows."""
    rows = max(len(part) for part in parts)
    return [part.expand(rows, *part.shape[1:]) for part in parts]


def _widths(d_model: int, n_heads: int, head: int | None, rope: int | None, latent: int | None) -> tuple[int, int, int]:
    """Widths of a head, of its rotated part and of the query latent.

    Raises:
        BlockError: the rotated part is wider than the head
    """
    head = head or even_heads(d_model, n_heads)
    rope = rope or max(2, head // 4 * 2)
    if rope > head:
        raise BlockError("rope_head_dim", rope, f"is a part of head_dim ({head})", "Lower it, or widen the head")
    return head, rope, latent or max(1, d_model // 4)
