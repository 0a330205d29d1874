"""How a scored attention is computed, whichever is cheapest: whole, in parts, over latents, on codes, on few keys."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.beside import Beside, attend_beside
from blockwright.blocks.attention.biases import attend_in_parts, reads_in_parts, score_terms
from blockwright.blocks.attention.coded import attend_to_codes, reads_codes
from blockwright.blocks.attention.latents import by_heads, bytes_of_a_head, queries_of_latents, widths
from blockwright.blocks.attention.lending import of_the_pass, over_depth, to_be_cached
from blockwright.blocks.attention.mistakes import expanded, refuse_call, refuse_other_shapes
from blockwright.blocks.attention.notes import Notes, apart, noted
from blockwright.blocks.attention.remembered import Held, Layout, layout, parts, side_by_side
from blockwright.blocks.attention.selecting import selected
from blockwright.blocks.base import Queries
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Carry, Pass
from blockwright.blocks.kernels import few_keys, few_queries, latent_attention
from blockwright.blocks.kernels.few_rows import by_mkl, reads_fast
from blockwright.blocks.kernels.latent_attention import absorbs, key_multiple, out_of_latents
from blockwright.blocks.kernels.scoring import Bias, Scoring, dense
from blockwright.blocks.selector.base import Asked

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored


def attend(
    block: Scored, x: Tensor, given: Pass, q: Tensor, held: Held, latent: Tensor, beside: Beside | None
) -> Tensor:
    """``Scored.attend``.

    Raises:
        TypeError: what is given has wrong shapes, or others than the cache was made for
    """
    cache, T = given.cache, q.shape[1]
    if cache is None or not cache.length:
        refuse_call(block, x, q, held)
    if beside is not None:
        return attend_beside(block, given, Queries(x, q, given.positions), parts(held)[0], beside)
    if block.kv_source is not None and (cache is None or cache.spread):
        held = of_the_pass(block, x, held, given.carry)
    shape, notes = layout(held) if held else block.remembered(), noted(block, x, given)
    if cache is None:
        queries = Queries(x, q, given.positions)
        bias, segments = score_terms(block.position, queries, given, notes.position)
        asked = _asked(block, latent, queries, given)
        bias = _selected(block, asked, given, next(iter(held.values())), shape, notes.selector, segments, bias)
        return _whole(block, queries, parts(held), notes.scores, bias, segments)
    if not (cache.spread or cache.length):
        refuse_other_shapes(block, block.remembered(), shape)
    new, carry = (*to_be_cached(x, held), *notes.side_by_side()), given.carry
    if (n := min(given.needed or T, T)) < T:
        x, latent, q, given = x[:, -n:], latent[:, -n:], q[:, -n:], given.of_last(n)
    queries = Queries(x, q, given.positions)
    y = _to_cache(block, _asked(block, latent, queries, given), given, queries, cache, new, shape, carry)
    return y if n == T else F.pad(y, (0, 0, 0, 0, T - n, 0))


def _asked(block: Scored, latent: Tensor, queries: Queries, given: Pass) -> Asked | None:
    return None if block.selector is None else Asked(queries.x, latent, queries.q, given.positions, given.declared)


def _to_cache(
    block: Scored,
    asked: Asked | None,
    given: Pass,
    queries: Queries,
    cache: Cache,
    new: tuple[Tensor, ...],
    shape: Layout,
    carry: Carry | None,
) -> Tensor:
    """Attention of the last T tokens to a cache, after all new ones are appended to it."""
    q, n_new, slots = queries.q, new[0].shape[1], len(shape.shapes)
    T = q.shape[1]
    if reads_codes(block, cache, q, n_new):
        return attend_to_codes(block, given, queries, cache, new, shape)
    S = cache.length + n_new
    all_seen = block.selector is None or block.selector.takes_all(S)
    up = None if cache.spread or block.scores is not None or block.window is not None else block.up()
    absorbed = up if up is not None and absorbs(T, S, *widths(q, up, shape)) else None
    expands = absorbed is None or n_new > T  # no tensor may grow with a long prompt, for the last token either
    keeps_own = len(new) == slots and block.scores is None and block.kv_source is None
    if expands and all_seen and keeps_own and reads_in_parts(block.kernels, cache, n_new):

        def read(tokens: slice) -> tuple[Tensor, Tensor]:
            return block.expand(shape.apart(cache.read(tokens)))

        return attend_in_parts(block.position, queries, cache, new, block.scale, read)

    rounded = {} if absorbed is None or block.kv_source is not None else {"multiple": key_multiple(q.dtype, q.device)}
    longer: Sequence[Tensor] = cache.append(*new, **rounded)
    if block.kv_source is not None and not cache.spread:
        longer = _of_depth(block, new[0], longer, carry)
    stored = longer if absorbed is None else [t[:, :S] for t in longer]
    notes = apart(block, stored[slots:])
    bias, segments = score_terms(block.position, queries, given, notes.position)
    bias = _selected(block, asked, given, stored[0], shape, notes.selector, segments, bias)
    y = None if all_seen or cache.spread else _on_few(block, queries, stored[:slots], notes, shape, bias, up)
    if y is not None:
        return y
    if absorbed is None:
        return _whole(block, queries, shape.apart(stored), notes.scores, bias, segments)
    with by_mkl() if T <= few_queries.FEW and reads_fast(q) else nullcontext():
        q, value_up = queries_of_latents(q, absorbed, shape)
        y = block.kernels.attend_latents(q, longer[0], S, absorbed.shape[-1], block.scale, dense(bias))
        return out_of_latents(y, value_up)


def _of_depth(block: Scored, new: Tensor, stored: Sequence[Tensor], carry: Carry | None) -> Sequence[Tensor]:
    """What is stored, with a selector's part left as it is, after it was exchanged with other layers."""
    assert block.kv_source is not None
    n = len(block.remembered().shapes) if block.kv_source.makes else 1
    return *over_depth(block, new, stored[:n], carry, stored[0].shape[1]), *stored[n:]


def _selected(
    block: Scored,
    asked: Asked | None,
    given: Pass,
    stored: Tensor | tuple[Tensor, ...],
    shape: Layout,
    index: tuple[Tensor, ...],
    segments: Tensor | None,
    bias: Bias,
) -> Bias:
    """The bias with what the selector hides; as it is without one."""
    if block.selector is None or asked is None:
        return bias

    def keys(of: Tensor) -> Tensor:
        apart = shape.apart([of])
        return block.expand(apart)[0] if len(shape.shapes) == 1 else block.keys(apart)

    return selected(block.selector, asked, side_by_side(stored), keys, index, segments, given, bias, block.scale)


def _on_few(
    block: Scored,
    queries: Queries,
    stored: Sequence[Tensor],
    notes: Notes,
    shape: Layout,
    bias: Bias,
    up: Tensor | None,
) -> Tensor | None:
    """Attention to the keys that the selector leaves, over latents if it can be; None where they are not few."""
    if not isinstance(bias, Tensor):
        return None
    q = queries.q
    if up is None:

        def own(of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], bias: Tensor) -> Tensor:
            some, stored, noted = Queries(*of_queries), of_keys[: len(shape.shapes)], of_keys[len(shape.shapes) :]
            return _scored(block, some, *expanded(block, shape.apart(stored), some.q), noted, bias)

        # What is remembered as one is expanded for each query: of no more keys than there are in all.
        least = few_keys.PART if q.shape[1] == 1 else few_keys.PART_OF_SEVERAL
        part = None if len(shape.shapes) > 1 else max(least, q.shape[1])
        of_queries = queries.x, q, queries.positions.expand(len(q), -1)
        return few_keys.attend_few(own, of_queries, (*stored, *notes.scores), bias, part)

    def own_latents(of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], bias: Tensor) -> Tensor:
        (q,), (latents,) = of_queries, of_keys
        return block.kernels.attend_latents(q, latents, latents.shape[1], up.shape[-1], block.scale, bias)

    q, value_up = queries_of_latents(q, up, shape)
    y = few_keys.attend_few(own_latents, (q,), tuple(stored), bias, few_keys.PART)
    return None if y is None else out_of_latents(y, value_up)


def _whole(
    block: Scored,
    queries: Queries,
    parts: Sequence[Tensor],
    noted: tuple[Tensor, ...],
    bias: Bias,
    segments: Tensor | None,
) -> Tensor:
    """Attention over the keys and values of all that is remembered.

    For few queries on many keys all heads' keys and values would outgrow the rest of a layer: those of latents are
    expanded for some heads at a time, and again for the gradient.
    """
    q = queries.q
    up = None if q.shape[1] == parts[0].shape[1] or block.scores is not None else block.up()
    if up is None or q.shape[2] * bytes_of_a_head(q, up, parts) <= latent_attention.KEPT:
        return _scored(block, queries, *expanded(block, parts, q), noted, bias, segments)

    def some(q: Tensor, k: Tensor, v: Tensor, bias: Bias) -> Tensor:
        return _scored(block, queries._replace(q=q), k, v, noted, bias, segments)

    return by_heads(some, q, parts, up, bias)


def _scored(
    block: Scored,
    queries: Queries,
    k: Tensor,
    v: Tensor,
    noted: tuple[Tensor, ...],
    bias: Bias,
    segments: Tensor | None = None,
) -> Tensor:
    scoring = Scoring(block.scale, bias, segments, block.window)
    if block.scores is None:
        return block.kernels.attend(queries.q, k, v, scoring)
    return block.scores(queries.q, k, v, scoring, queries.x, noted)
