"""How a scored attention is computed, in the cheapest of several ways that compute the same.

``Call`` knows what every way needs, and makes it when it is first asked: what is remembered, so that a way that reads
a cache in parts or as codes never has it read whole; and what is added to scores. A way returns None where it does not
suit; ``whole`` is the definition, and the last resort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blockwright.blocks.attention.remembered import Held, layout, noting, over_depth, parts, side_by_side
from blockwright.blocks.attention.scoring import Selection, position_bias, score_terms
from blockwright.blocks.base import Queries
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import attention, coded_attention, long_attention
from blockwright.blocks.kernels.attention import into_latents, of_latents, out_of_latents
from blockwright.blocks.kernels.products import by_mkl, reads_fast
from blockwright.blocks.kernels.scoring import Bias, Scoring, dense, of_heads
from blockwright.blocks.selector.base import Asked

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored


WHOLE = ("sdpa", "reference")  # implementations that, where they are named, compute on all keys at once


class Widths(NamedTuple):
    """Of ``Scored.up`` and what it expands."""

    latent: int  # C
    shared: int  # R
    key: int  # n
    value: int  # V


class Past(NamedTuple):
    """What is remembered of all tokens seen, as a cache holds it, part by part, and what each child noted."""

    slots: Sequence[Tensor]
    parts: Sequence[Tensor]
    notes: dict[str, tuple[Tensor, ...]]


class Call:
    """One call of ``Scored.attend``; T are the tokens whose result is needed, S those that they see."""

    def __init__(self, block: Scored, x: Tensor, given: Pass, q: Tensor, held: Held, latent: Tensor) -> None:
        self.block, self.cache, self.carry = block, given.cache, given.carry
        self._past: Past | None = None
        self._terms: tuple[Bias, Tensor | None] | None = None
        self.n_new = T = q.shape[1]
        shared = block.kv_source is not None and (self.cache is None or self.cache.spread)
        self.shape = layout(held) if held else block.remembered()
        if shared:
            self.shape = block.remembered()
            own = over_depth(block, [side_by_side(part) for part in held.values()], self.carry, x, T)
            self.own: Sequence[Tensor] = self.shape.apart(own)
            self.new: tuple[Tensor, ...] = tuple(own)
        else:
            self.own = parts(held)
            self.new = () if self.cache is None else (*map(side_by_side, held.values()),) or (x[..., :0],)
        kinds = noting(block)
        self.noted = {kind: child.remember(x, given.positions, given.declared) for kind, child in kinds.items()}
        if self.cache is not None:
            self.new = (*self.new, *(t for notes in self.noted.values() for t in notes))
            if (n := min(given.needed or T, T)) < T:
                x, latent, q, given = x[:, -n:], latent[:, -n:], q[:, -n:], given.of_last(n)
        self.given, self.queries, self.latent = given, Queries(x, q, given.positions), latent
        self.T, self.S = q.shape[1], T if self.cache is None else self.cache.length + T
        self.all_seen = block.selector is None or block.selector.takes_all(self.S)
        self.reads_cache = self.cache is not None and not self.cache.spread
        self.up = block.up() if self.reads_cache and block.scores is None and block.window is None else None
        self.absorbs = self.up is not None and attention.absorbs(self.T, self.S, *self.widths(self.up))

    def widths(self, up: Tensor) -> Widths:
        _, (shared,) = next(iter(self.shape.shapes.values()))
        n = self.queries.q.shape[-1] - shared
        return Widths(up.shape[2], shared, n, up.shape[1] - n)

    @property
    def past(self) -> Past:
        """All that is remembered; read once."""
        if self._past is None:  # not a cached property: its lock breaks a compiler's graph
            self._past = self._read()
        return self._past

    @property
    def terms(self) -> tuple[Bias, Tensor | None]:
        """What is added to scores, and documents; −∞ on what the selector leaves out; made once."""
        if self._terms is None:
            self._terms = self._added()
        return self._terms

    def _read(self) -> Past:
        """The new tokens are stored first; of latents that stay so, the number is rounded up."""
        block, cache = self.block, self.cache
        if cache is None:
            return Past([], self.own, self.noted)
        q, plain = self.queries.q, block.kv_source is None
        longer: Sequence[Tensor] = (
            cache.append(*self.new, multiple=attention.key_multiple(q.dtype, q.device))
            if self.absorbs and plain
            else cache.append(*self.new)
        )
        own = len(self.shape.shapes) if block.borrows() is None else 1
        if not plain and not cache.spread:
            depth = over_depth(block, longer[:own], self.carry, self.new[0], longer[0].shape[1])
            longer, own = (*depth, *longer[own:]), len(depth)
        elif cache.spread:
            own = len(self.shape.shapes)
        left = iter(t[:, : self.S] for t in longer[own:]) if self.absorbs else iter(longer[own:])
        notes = {kind: tuple(next(left) for _ in child.slots()) for kind, child in noting(block).items()}
        stored = [t[:, : self.S] for t in longer[:own]] if self.absorbs else longer[:own]
        self.rounded = longer[0]
        return Past(stored, self.shape.apart(stored), notes)

    def _added(self) -> tuple[Bias, Tensor | None]:
        block, given, (x, q, positions) = self.block, self.given, self.queries
        notes, slots = self.past.notes, self.past.slots
        bias, segments = score_terms(block.position, self.queries, given, notes.get("position", ()))
        if block.selector is None:
            return bias, segments

        def keys(of: Tensor) -> Tensor:
            apart = self.shape.apart([of])
            return block.expand(apart)[0] if len(self.shape.shapes) == 1 else block.keys(apart)

        n = len(next(iter(self.shape.shapes.values())))
        stored = slots[0] if slots else side_by_side(tuple(self.own[:n])) if n > 1 else self.own[0]
        asked = Asked(x, self.latent, q, positions, given.declared)
        selection = Selection(block.selector, asked, stored, keys, notes["selector"], segments, given)
        return selection(bias, block.scale), segments

    def into_latents(self, up: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B,T,N,C+R], and the value matrices of the heads, [N,V,C]."""
        w = self.widths(up)
        own, rest = self.queries.q.split((w.key, w.shared), -1)
        return torch.cat((into_latents(own, up[:, : w.key]), rest), -1), up[:, w.key :]


def scored(
    block: Scored,
    queries: Queries,
    kv: tuple[Tensor, Tensor],
    bias: Bias,
    segments: Tensor | None = None,
    noted: tuple[Tensor, ...] = (),
) -> Tensor:
    """The definition, of some queries, keys and values."""
    scoring = Scoring(block.scale, bias, segments, block.window)
    if block.scores is None:
        return block.kernels.attend(queries.q, *kv, scoring)
    return block.scores(queries.q, *kv, scoring, queries.x, noted)


def attend(block: Scored, x: Tensor, given: Pass, q: Tensor, held: Held, latent: Tensor) -> Tensor:
    """``Scored.attend``."""
    call, y = Call(block, x, given, q, held, latent), None
    for way in WAYS:
        if (y := way(call)) is not None:
            break
    y = whole(call) if y is None else y
    return y if call.n_new == call.T else F.pad(y, (0, 0, 0, 0, call.n_new - call.T, 0))


def on_codes(call: Call) -> Tensor | None:
    """A few tokens on a quantised cache, whose codes are read as they are: keys and values of heads, or latents."""
    block, cache, q = call.block, call.cache, call.queries.q
    if cache is None or not cache.gives_codes(call.n_new) or call.n_new > coded_attention.FEW:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or cache.segments() is not None:
        return None
    if block.kernels.coded_attention == "whole" or block.position.slots():  # nothing reads codes on this device
        return None
    if block.selector or block.scores or block.kv_source or not (block.up() is not None or block.remembers_heads()):
        return None
    keys, *values = cache.append_codes(*call.new)
    scoring = Scoring(block.scale, score_terms(block.position, call.queries, call.given)[0])
    if (up := block.up()) is None:
        return block.kernels.attend_codes(q, keys, values[0], scoring)
    q, value_up = call.into_latents(up)
    return out_of_latents(block.kernels.attend_codes(q, keys, keys._replace(width=up.shape[-1]), scoring), value_up)


def in_parts(call: Call) -> Tensor | None:
    """Many tokens on a long past on a CPU, of which some keys are read, and expanded, at a time."""
    block, cache, queries = call.block, call.cache, call.queries
    if cache is None or not call.all_seen or block.scores is not None or block.kv_source is not None:
        return None
    if not queries.q.is_cpu or block.kernels.attention in WHOLE or not long_attention.suits(call.n_new, call.S):
        return None
    in_order = type(cache).append is Cache.append and type(cache).indices is Cache.indices
    if not in_order or len(call.new) > len(call.shape.shapes) or (call.absorbs and call.n_new == call.T):
        return None
    cache.store(*call.new)

    def read(tokens: slice) -> tuple[Tensor, Tensor]:
        return block.expand(call.shape.apart(cache.read(tokens)))

    bias = position_bias(block.position, queries, cache)
    return long_attention.attention_in_parts(queries.q, cache.length, read, block.scale, bias)


def on_few_keys(call: Call) -> Tensor | None:
    """On the keys that a selector leaves, where they are few: over latents if it can be."""
    if call.all_seen or not call.reads_cache or not isinstance(bias := call.terms[0], Tensor):
        return None
    block, past, queries, up = call.block, call.past, call.queries, call.up
    n, q = len(past.slots), queries.q
    if up is None:

        def own(of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], bias: Tensor) -> Tensor:
            some = Queries(*of_queries)
            kv = block.expand(call.shape.apart(of_keys[:n]))
            return scored(block, some, kv, bias, noted=of_keys[n:])

        # What is remembered as one is expanded for each query: of no more keys than there are in all.
        least = long_attention.PART if call.T == 1 else long_attention.PART_OF_SEVERAL
        part = None if n > 1 else max(least, call.T)
        of_queries = queries.x, q, queries.positions.expand(len(q), -1)
        return long_attention.attend_few(own, of_queries, (*past.slots, *past.notes.get("scores", ())), bias, part)

    def own_latents(of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], bias: Tensor) -> Tensor:
        (q,), (latents,) = of_queries, of_keys
        return block.kernels.attend_latents(q, latents, latents.shape[1], up.shape[-1], block.scale, bias)

    q, value_up = call.into_latents(up)
    y = long_attention.attend_few(own_latents, (q,), tuple(past.slots), bias, long_attention.PART)
    return None if y is None else out_of_latents(y, value_up)


def on_latents(call: Call) -> Tensor | None:
    """Few tokens on latents that are never expanded (blocks/kernels/attention.py)."""
    if not call.absorbs or call.up is None:
        return None
    bias = dense(call.terms[0])
    with by_mkl() if call.T <= coded_attention.FEW and reads_fast(call.queries.q) else nullcontext():
        q, value_up = call.into_latents(call.up)
        y = call.block.kernels.attend_latents(q, call.rounded, call.S, call.up.shape[-1], call.block.scale, bias)
        return out_of_latents(y, value_up)


def by_heads(call: Call) -> Tensor | None:
    """Some heads at a time, where all heads' keys and values would outgrow the rest of a layer: those of latents are
    expanded for few queries on many keys, and again for the gradient."""
    q, block = call.queries.q, call.block
    up = None if block.scores is not None else block.up()
    if up is None or call.past.parts[0].shape[1] == call.T:
        return None
    (latent, shared), w = call.past.parts, call.widths(up)
    a_head = latent[..., 0].numel() * (w.key + w.shared + w.value) * latent.element_size()
    if q.shape[2] * a_head <= attention.KEPT:
        return None
    bias, segments = call.terms

    def some(up: Tensor, q: Tensor, bias: Bias) -> Tensor:
        kv = of_latents(F.linear(latent, up.flatten(0, 1)), shared, w.key, w.value)
        return scored(block, call.queries._replace(q=q), kv, bias, segments)

    together = attention.heads_together(q.shape[2], a_head)
    heads = [slice(first, first + together) for first in range(0, q.shape[2], together)]
    given = [(up[h], q[:, :, h], None if bias is None else of_heads(bias, h)) for h in heads]
    return torch.cat([checkpoint(some, *each, use_reentrant=False, preserve_rng_state=False) for each in given], 2)


def whole(call: Call) -> Tensor:
    """The definition: keys and values of all that is remembered."""
    kv = call.block.expand(call.past.parts)
    return scored(call.block, call.queries, kv, *call.terms, call.past.notes.get("scores", ()))


WAYS: tuple[Callable[[Call], Tensor | None], ...] = (on_codes, in_parts, on_few_keys, on_latents, by_heads)
