from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import even_heads, rotated_part
from blockwright.blocks.attention.remembered import Memory, refuse_notes
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.base import Drawn, Keys, Kind, Queries, number
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compressor.base import Compressor, Entries, WindowedCache
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.long_attention import few, pieces, taken
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.blocks.scores import Scores
from blockwright.blocks.selector.base import Asked
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count

# --- keys of the last tokens, and others beside them ------------------------------------------------------------------


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


# --- attention to both, in one softmax --------------------------------------------------------------------------------


Beside = Callable[[], Entries]
ROWS = 256  # queries whose scores are in memory at a time


def attend_beside(block: Scored, given: Pass, queries: Queries, k: Tensor, beside: Beside) -> Tensor:
    """Some queries at a time, each on its window and on those keys beside it that it sees.

    Args:
        block, given: as of ``Scored.attend``
        queries: the tokens
        k: [B,T,1,H] of the tokens, keys and values at once
        beside: asked for the other keys once the tokens' own are remembered

    Returns:
        [B,T,N,H]
    """
    if (held := windowed(given.cache)) is None:
        near = Near(k, given.positions, torch.arange(k.shape[1], device=k.device), given.segments, None)
    else:
        keys, index = held.remember(k)
        places = index[None] if held.padding is None else (index - held.padding[:, None]).clamp(min=0)
        near = Near(keys, places, index, None, held.padding)
    assert block.window is not None
    queries = queries._replace(positions=queries.positions.expand(len(queries.q), -1))
    return _attended(block, queries, near, beside(), block.window)


def _attended(block: Scored, queries: Queries, near: Near, entries: Entries, window: int) -> Tensor:
    """Some queries at a time, each on its window and on all entries: [B,T,N,H]."""
    T, parts = queries.q.shape[1], []
    for start in range(0, T, ROWS):
        rows, own = slice(start, min(start + ROWS, T)), near.before(T, start, min(start + ROWS, T), window)
        some = queries.rows(rows)
        chosen = entries.seen(rows)
        first = slice(0, chosen.shape[-1])
        far = Source(chosen, entries.keys[:, first, None], entries.positions[:, first])
        sources = far, Source(own.seen(rows.stop - start, window), own.keys, own.positions)
        index = few(chosen)
        if index is None:
            parts.append(_on_all(block, some, sources))
        else:
            parts.append(_on_few(block, some, sources, index, window))
    return torch.cat(parts, 1)


def _on_few(block: Scored, queries: Queries, sources: Sequence[Source], index: Tensor, window: int) -> Tensor:
    """Attention of each query to its own keys, gathered: chosen ones by their indices [B|1,t,K], and its window."""
    q, parts = queries.q, []
    (B, t), device = q.shape[:2], q.device
    S, width = sources[1].seen.shape[-1], min(sources[1].seen.shape[-1], window)
    first = torch.arange(S - t - width + 1, S - width + 1, device=device).clamp(min=0)  # up to the query's own key
    last = (first[:, None] + torch.arange(width, device=device))[None]
    a_query = B * (index.shape[-1] + width) * q.shape[-1] * q.element_size()
    for rows in pieces(t, a_query, device):
        own = [
            each.some(rows).taken(at[:, rows].expand(B, -1, -1))
            for each, at in zip(sources, (index, last), strict=True)
        ]
        some = Queries(*(each.flatten(0, 1)[:, None] for each in queries.rows(rows)))
        y = _on_all(block, some, own)
        parts.append(y[:, 0].unflatten(0, (B, -1)))
    return torch.cat(parts, 1)


def _on_all(block: Scored, queries: Queries, sources: Sequence[Source]) -> Tensor:
    """Attention of some queries to all keys of the sources, of which each sees some."""
    seen = torch.cat(_alike(*(each.seen for each in sources)), -1)
    keys = torch.cat([each.keys for each in sources], 1)
    places = torch.cat(_alike(*(each.positions for each in sources)), -1)
    q = queries.q
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))[:, None]
    order = torch.arange(seen.shape[-1], device=q.device)
    far = dense(block.position.bias(queries, Keys(places, order)))
    scoring = Scoring(block.scale, bias if far is None else bias + far)
    if block.scores is None:
        return block.kernels.attend(q, keys, keys, scoring)
    return block.scores(q, keys, keys, scoring, queries.x, ())


def windowed(cache: Cache | None) -> WindowedCache | None:
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


@register("attention", "shared_kv")
class SharedKV(Scored):
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

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"group": "matrix"}
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
        super().__init__(d_model)
        H, self.rope, latent = _widths(d_model, n_heads, head_dim, rope_head_dim, q_lora_rank)
        if n_heads % n_groups:
            rule = f"must divide n_heads ({n_heads})"
            raise BlockError("n_groups", n_groups, rule, "Use 1 for all heads in one group")
        if compressor is not None:
            refuse_notes({"position": position, "scores": scores})
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

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        latent, rotate = self.q_norm(self.q_down(x)), partial(self._rotated, length=given.declared)
        q = self.query_norm(self.q_up(latent).unflatten(-1, (self.n_heads, -1)))
        q = rotate(q, given.positions, which=0)
        k = rotate(self.kv_norm(self.kv(x))[:, :, None], given.positions)
        if self.compressor is None:
            y = self.attend(x, given, q, {"k": k}, latent)
        else:
            asked = Asked(x, latent, q, given.positions, given.declared, real=given.real)
            held = windowed(given.cache)
            beside = partial(self.compressor, asked, given, held, self.scale, rotate)
            y = attend_beside(self, given, Queries(x, q, given.positions), k, beside)
        y = rotate(y, -given.positions).flatten(-2).unflatten(-1, (self.n_groups, -1))
        return self.output(torch.einsum("btgh,glh->btgl", y, self.group.to(y.dtype)).flatten(-2))

    def drawn(self) -> Drawn:
        heads = f"{self.n_heads} heads of {self.head_dim}, {self.rope} of it rotated"
        window = () if self.window is None else (f"window {number(self.window)}",)
        groups = f"output in {self.n_groups} groups of {number(self.group.shape[1])}"
        return Drawn((heads, *window, f"query latent {number(self.q_down.out_features)}", groups))

    def expand(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        (k,) = held
        return k, k

    def memory(self) -> Memory:
        return {"k": [(1, self.head_dim)]}

    def lends(self) -> str | None:
        return None if self.compressor is None else self.compressor.lends()

    def borrows(self) -> str | None:
        return None if self.compressor is None else self.compressor.borrows()

    def _rotated(self, heads: Tensor, positions: Tensor, length: int | Tensor, which: int = 1) -> Tensor:
        """[B,T,·,W] with its last part rotated, as keys are (1) or as queries are (0)."""
        rest, turning = heads.split((heads.shape[-1] - self.rope, self.rope), -1)
        return torch.cat((rest, self.position.rotate_in(turning, turning, positions, length)[which]), -1)

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        """As in the contract; with a compressor ``bits`` are ignored: most keys are means of many tokens."""
        if (made := self.compressor) is None:
            return super().new_cache(batch, length, dtype, device, bits)
        return WindowedCache(
            batch, length, self.window or length, self.head_dim, made.every, made.held(), dtype, device
        )


def _widths(d_model: int, n_heads: int, head: int | None, rope: int | None, latent: int | None) -> tuple[int, int, int]:
    """Widths of a head, of its rotated part and of the query latent."""
    head = head or even_heads(d_model, n_heads)
    return head, rotated_part(head, rope), latent or max(1, d_model // 4)
