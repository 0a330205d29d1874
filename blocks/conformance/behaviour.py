"""Checks of a block's computation. Bounds apply to the decoder's normalised hidden states, which are about 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import row_factors
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.conformance.of_kinds import remembered_by_mix
from blockwright.blocks.conformance.setting import (
    BOUND,
    MODEL,
    ExemptError,
    Setting,
    must,
    must_agree,
    shown,
    tokens,
    watched,
)
from blockwright.blocks.convolution import Convolution
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.blocks.kernels.long_attention import LargestScores
from blockwright.blocks.memory import numbers
from blockwright.registry import BlockError

# Contracts whose output has the input's shape.
KEEPS_SHAPE = ("attention", "ffn", "experts", "norm", "residual", "memory")
# Kinds that process queries and keys.
SCORED = ("attention", "position", "scores", "readout", "compressor", "kv_source")
# Kinds that decide what a cache holds, or process what it returns.
CACHED = (*SCORED, "convolution", "loop", "entry")
STEP_BOUND = 3e-5  # compressed keys are sums in another order too: 1.1e-5 in fp32, 4e-15 in fp64
BF16_BOUND = 0.08  # of a token's norm: about twenty roundings of 0.4 % each, in random directions


def states(decoder: Decoder, ids: Tensor, positions: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Hidden states [B,T,D] without gradients; a block that draws noise draws the same in every call."""
    torch.manual_seed(0)
    with torch.no_grad():
        tokens, media = shown(decoder, ids)
        positions = None if media else positions
        return decoder.hidden(tokens, positions, segments, media=media)[0][:, -ids.shape[1] :]


def shape_and_dtype(setting: Setting) -> None:
    """Tokens [B,T] give [B,T,D] in the model's dtype, fp32 and bf16; so does the block, if its contract says so."""
    for dtype in (torch.bfloat16,) if setting.brief else (torch.float32, torch.bfloat16):
        decoder, ids, D = setting.decoder(dtype=dtype), tokens(2, 7), MODEL["d_model"]
        for block in setting.instances(decoder).values():
            if isinstance(block, Scored) and block.borrows() is None and type(block).new_cache is Scored.new_cache:
                remembered_by_mix(block)
        with watched(setting.instances(decoder).values()) as seen:
            hidden = states(decoder, ids)
        must(hidden.shape == (2, 7, D), f"hidden states of shape {tuple(hidden.shape)} instead of (2, 7, {D})")
        must(hidden.dtype == dtype, f"a model in {dtype} gives hidden states in {hidden.dtype}")
        for block, (given, *_), out in seen if setting.kind in KEEPS_SHAPE else ():
            got = out[0] if isinstance(out, tuple) else out
            want = given.shape if getattr(block, "streams", None) != 0 else (*given.shape[:2], got.shape[2], D)
            must(got.shape == want, f"{tuple(given.shape)} came out as {tuple(got.shape)}")
            must(got.dtype == given.dtype, f"{given.dtype} came out as {got.dtype}")


def causality(setting: Setting) -> None:
    """Changing tokens from t on leaves outputs before t unchanged, within 1e-5, in training and in evaluation."""
    decoder, ids = setting.decoder(), tokens(2, 9)
    for training in (False, True):
        places = [5 if training else 2] if setting.brief else range(1, 9)
        decoder.train(training)
        before = states(decoder, ids)
        for t in places:
            changed = ids.clone()
            changed[:, t:] = (changed[:, t:] + 7) % MODEL["vocab_size"]
            mode = "in training" if training else "in evaluation"
            what = f"the {t} tokens before a change, {mode}"
            must_agree(states(decoder, changed)[:, :t], before[:, :t], BOUND, what)


def stepping(setting: Setting) -> None:
    """With a cache, token by token and in chunks of any length equal one pass over all tokens, within 3e-5; also where
    the last token of each chunk alone is asked for, as in generation."""
    decoder, ids = setting.decoder(), tokens(2, 12)
    whole = states(decoder, ids)
    every = ([1] * 12, [5, 1, 4, 2], [12], [1, 8, 1, 2])  # some longer than the window of a block that has one
    for chunks in [[4, 1, 7], [1, 8, 3]] if setting.brief else every:
        named = ", ".join(map(str, chunks[:2]))
        if not setting.brief or chunks[0] > 1:
            must_agree(_in_chunks(decoder, ids, chunks), whole, STEP_BOUND, f"chunks of {named}, … tokens")
        if setting.brief and chunks[0] > 1:
            continue
        ends, caches = whole[:, torch.tensor(chunks, dtype=torch.int64).cumsum(0) - 1], decoder.new_caches(*ids.shape)
        with torch.no_grad():
            last = torch.cat([decoder.last_hidden(part, caches) for part in ids.split(chunks, 1)], 1)
        must_agree(last, ends, STEP_BOUND, f"the last of chunks of {named}, … tokens")


def ragged_rows(setting: Setting) -> None:
    """With a cache, rows of unequal length padded on the left equal each row alone, within 1e-5 in double precision.
    Attentions that use ``score_bias`` of blocks/attention/scoring.py satisfy this."""
    _needs_caches(setting)
    # In fp32 a loop of four visits differs by 1e-5 for the order of its sums alone; in fp64 all differ by 2e-14.
    decoder, ids, padding = setting.decoder(dtype=torch.float64), tokens(3, 12), (1, 9, 4)
    for chunks in ([7, 1, 4],) if setting.brief else ([12], [7, 1, 4], [1] * 12):
        found = _in_chunks(decoder, ids, chunks, padding=torch.tensor(padding, dtype=torch.int64))
        for row, n in [(2, 4)] if setting.brief else enumerate(padding):
            own = states(decoder, ids[row : row + 1, n:])
            must_agree(found[row : row + 1, n:], own, BOUND, f"{12 - n} tokens behind {n} of padding")


def quantised_caches(setting: Setting) -> None:
    """With caches of 8, 6 and 4 bits, token by token equals one pass, within 1e-5 of the median token's norm (a value
    between two codes may round either way); and 8 bits are off by at most 8 % of it, as much as bf16 may be."""
    _needs_caches(setting)
    decoder, ids = setting.decoder(), tokens(2, 12)
    exact = states(decoder, ids)
    for bits in (max(BITS), min(BITS)) if setting.brief else BITS:
        whole = _in_chunks(decoder, ids, [12], bits)
        if not setting.brief or bits == min(BITS):
            parts = [5, 1, 6] if setting.brief else [1] * 12
            apart = median_off(_in_chunks(decoder, ids, parts, bits), whole)
            must(apart <= BOUND, f"tokens one by one at {bits} bits are off by {apart:.2e} of a token's norm")
        off = median_off(whole, exact)
        must(bits != 8 or off <= BF16_BOUND, f"8 bits are off by {off:.1%} of a token's norm")


def median_off(found: Tensor, right: Tensor) -> float:
    """Distance between states [B,T,D] relative to their norm, for the median token."""
    return ((found - right).norm(dim=-1) / right.norm(dim=-1)).median().item()


def _needs_caches(setting: Setting) -> None:
    if setting.kind not in CACHED and not remembers_tails(setting.decoder()):
        raise ExemptError("it does not process what a cache returns")


def remembers_tails(decoder: Decoder) -> bool:
    """Whether its caches hold more than attentions leave in them."""
    return any(isinstance(block, Convolution) for block in decoder.modules())


def _in_chunks(
    decoder: Decoder, ids: Tensor, chunks: Sequence[int], bits: int | None = None, padding: Tensor | None = None
) -> Tensor:
    try:
        caches = decoder.new_caches(ids.shape[0], ids.shape[1], bits, padding)
    except NotImplementedError:
        raise ExemptError("its attention keeps no cache") from None
    except BlockError as error:  # an attention with another class of caches
        raise ExemptError(error.rule) from None
    with torch.no_grad():
        return torch.cat([decoder.hidden(part, caches=caches)[0] for part in ids.split(chunks, 1)], 1)


def packing(setting: Setting) -> None:
    """Documents packed into one row, separated by segments, equal each document alone, within 1e-5."""
    decoder, lengths = setting.decoder(), (5, 1, 7)
    documents = [tokens(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.cat([torch.full((n,), i, dtype=torch.int64) for i, n in enumerate(lengths)])[None]
    packed = states(decoder, torch.cat(documents, 1), positions, segments)
    for i, (document, own) in enumerate(zip(documents, packed.split(lengths, 1), strict=True)):
        if setting.brief and i == 0:
            continue
        must_agree(own, states(decoder, document), BOUND, f"document {i + 1} of 3 in a packed row")


def writes_nothing(setting: Setting) -> None:
    """A call changes none of the tensors that it is given, and leaves none on the block."""
    decoder, ids = setting.decoder(own=True).train(), tokens(2, 7)
    blocks, before = setting.instances(decoder), list[list[tuple[Tensor, int]]]()
    kept = {name: _kept(block) for name, block in blocks.items()}

    def note(block: nn.Module, given: tuple[Any, ...]) -> None:
        before.append([(t, t._version) for t in _tensors(given)])

    def compare(block: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        changed = [tuple(t.shape) for t, version in before.pop() if t._version != version]
        must(not changed, f"it changes in place what it is given, of shape {changed}: x = x + …, not x += …")

    hooks = [
        watch
        for m in blocks.values()
        for watch in (m.register_forward_pre_hook(note), m.register_forward_hook(compare))
    ]
    try:
        states(decoder, ids)
    finally:
        for hook in hooks:
            hook.remove()
    for name, block in blocks.items():
        left = ", ".join(path for path, n in _kept(block).items() if n > kept[name].get(path, 0))
        must(not left, f"a call leaves a tensor in {left}: what crosses depth is in given.carry, tokens in the cache")


def _kept(block: nn.Module) -> dict[str, int]:
    """How many tensors are in each attribute that is neither a parameter nor a buffer nor a module."""
    return {
        f"self.{f'{path}.' if path else ''}{name}": sum(1 for _ in _tensors(value))
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in a value, in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def batch_invariance(setting: Setting) -> None:
    """A row alone equals the same row in a batch, within 1e-5."""
    decoder, ids = setting.decoder(), tokens(3, 8)
    together = states(decoder, ids)
    for i in (1,) if setting.brief else range(3):
        must_agree(states(decoder, ids[i : i + 1]), together[i : i + 1], BOUND, f"row {i + 1} of 3 by itself")


def padding_invariance(setting: Setting) -> None:
    """Tokens appended on the right leave outputs before them unchanged, within 1e-5."""
    decoder, ids = setting.decoder(), tokens(2, 11)
    longer = states(decoder, ids)
    for length in (8,) if setting.brief else (8, 10):
        must_agree(states(decoder, ids[:, :length]), longer[:, :length], BOUND, f"{length} tokens without those after")


def gradients(setting: Setting) -> None:
    """The training loss, balance losses included, has a finite, non-zero gradient in every parameter."""
    decoder, ids = setting.decoder().train(), tokens(2, 12)
    if any(block.empty for block in setting.instances(decoder).values()):
        raise ExemptError("it leaves its slot empty")
    decoder.zero_grad()
    torch.manual_seed(0)
    seen, media = shown(decoder, ids[:, :-1])
    hidden, routings = decoder.hidden(seen, media=media)
    loss = decoder.nll(hidden[:, 1 - ids.shape[1] :], ids[:, 1:]) / ids.numel()
    torch.stack([loss, *(x for r in routings if r is not None for x in r.losses.values())]).sum().backward()
    for name, parameter in decoder.named_parameters():
        grad = parameter.grad
        must(grad is not None, f"{name} gets no gradient")
        grad = numbers(grad)  # type: ignore[arg-type]
        must(bool(torch.isfinite(grad).all()), f"{name} gets a gradient that is not finite")
        must(bool((grad != 0).any()), f"{name} gets a gradient of zeros")


def precision(setting: Setting) -> None:
    """bf16 differs from fp32 with the same weights by at most 8 % of a token's norm, for the median token (a near tie
    between experts may change sides), at positions around 200, where bf16 angles would be off by half a radian."""
    ids, positions = tokens(2, 24), torch.arange(200, 224)[None]
    low = states(setting.decoder(dtype=torch.bfloat16), ids, positions)
    exact = states(setting.last_decoder(torch.bfloat16).float(), ids, positions)
    off = (low.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    must(off.median().item() <= BF16_BOUND, f"bf16 is off by {off.median():.1%} of a token's norm")


def score_rows(setting: Setting) -> None:
    """Scaling the rows that an attention names, for one group of heads, scales the scores of these heads and of no
    others, within 1e-5."""
    if setting.kind not in SCORED:
        raise ExemptError("it does not process queries and keys")
    decoder, ids = setting.decoder(own=True), tokens(2, 9)
    attention: Any = decoder.layers[0].attention
    rows, weights = attention.score_rows(), dict(attention.named_parameters())
    if not rows:
        raise ExemptError("its attention names no rows")
    scores, found = LargestScores(attention), list[Tensor]()
    n_groups = min(weights[part.name].shape[0] // part.height for part in rows)
    factor = torch.ones(n_groups, dtype=torch.float32).index_fill(0, torch.tensor(0, dtype=torch.int64), 0.5)
    for _ in range(2):
        decoder.hidden(ids)
        largest = scores.take()
        must(largest is not None, "it names rows, and does not attend by self.kernels.attend")
        found.append(largest)  # type: ignore[arg-type]
        for part in rows:
            weight = weights[part.name].data
            weight.mul_(row_factors(part, len(weight), factor, 0.25).view(-1, *[1] * (weight.ndim - 1)))
    wanted = found[0] * factor.repeat_interleave(len(found[0]) // n_groups)
    must_agree(found[1], wanted, BOUND, "the largest scores after halving those of the first heads")
