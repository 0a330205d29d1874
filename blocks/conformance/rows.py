"""Checks of what a running batch does with caches: rows that come and go, and drafts that are forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.conformance.behaviour import STEP_BOUND, median_off, remembers_tails, states
from blockwright.blocks.conformance.setting import BOUND, MODEL, ExemptError, Setting, must, must_agree, tokens
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.job import Job, joinable_caches, refuse_dependent_rows
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.registry import BlockError

KINDS = ("attention", "selector", "compressor", "convolution", "kv_source", "memory", "loop", "entry")
ROOM = 26
# Prompts as they are read, before a row joins; then the steps that are made, each of a token of all rows; then the row
# that leaves. Newcomers are longer and shorter than the batch; common padding is dropped after each row that leaves.
SCHEDULE: list[tuple[list[int] | None, int, int | None]] = [
    ([3, 2], 1, None),
    ([9], 1, None),
    ([1, 1], 2, 0),
    ([6, 1, 4], 1, 0),
    (None, 1, 1),
    ([12, 1], 3, None),
]
LENGTHS = (9, 14, 12, 18, 16)  # tokens of each row that joins; it is not fed more


def joining_rows(setting: Setting) -> None:
    """With a cache, exact or of 8, 6 and 4 bits, rows that join a batch, move and leave it have the states that each
    has alone, within 3e-5 (with bits the median token, within 1e-5), though all that the batch held of them before is
    NaN; in fp64 a running batch draws the tokens of each request alone. An attention whose caches rows cannot join is
    refused by ``Batch``."""
    refuse(setting)
    decoder = setting.decoder()
    documents = [tokens(1, n, seed=i) for i, n in enumerate(LENGTHS)]
    for bits in known_bits(decoder, (None, BITS[0]) if setting.brief else (None, *BITS)):
        pairs = scheduled(decoder, documents, bits)
        found, right = (torch.cat([row.flatten(0, 1) for row in rows]) for rows in zip(*pairs, strict=True))
        must_equal(found, right, bits, "rows that join and leave")
    drawn_alike(setting.decoder(dtype=torch.float64))


def refuse(setting: Setting) -> None:
    """Exempt a block that a running batch refuses, or whose kind does not matter to caches.

    Raises:
        ExemptError
    """
    decoder = setting.decoder()
    if setting.kind not in KINDS and not remembers_tails(decoder):
        raise ExemptError("it does not decide what a cache holds")
    try:
        refuse_dependent_rows(decoder)
        joinable_caches(decoder, 1, 1, None)
    except BlockError as refusal:
        raise ExemptError(refusal.rule) from None


def known_bits(decoder: Decoder, every: Sequence[int | None]) -> Iterator[int | None]:
    """Those that its caches can have: a plug-in's may be exact only."""
    for bits in every:
        try:
            decoder.new_caches(1, 1, bits)
        except BlockError:
            continue
        yield bits


class Row:
    """A document in a batch: the tokens that it has read, and the padding before them."""

    def __init__(self, ids: Tensor, right: Tensor) -> None:
        self.ids, self.right, self.read, self.padding = ids, right, 0, 0

    def next(self) -> Tensor:
        """[1,1], the next token."""
        self.read += 1
        return self.ids[:, self.read - 1 : self.read]


@torch.no_grad()
def scheduled(decoder: Decoder, documents: Sequence[Tensor], bits: int | None) -> list[tuple[Tensor, Tensor]]:
    """States of the rows of ``SCHEDULE`` and of each alone, pairs of [1,T,D]."""
    batch, rows, waiting = decoder.new_caches(4, ROOM, bits), list[Row](), list(documents)
    pairs: list[tuple[Tensor, Tensor]] = []
    for prompt, steps, leaving in SCHEDULE:
        if prompt is not None:
            ids = waiting.pop(0)
            right = alone(decoder, ids, bits)
            row, own = Row(ids, right), decoder.new_caches(1, ROOM, bits)
            for part in ids[:, : sum(prompt)].split(prompt, 1):
                pairs.append((decoder.hidden(part, caches=own)[0], right[:, row.read : row.read + part.shape[1]]))
                row.read += part.shape[1]
            join(batch, rows, row, own)
        for _ in range(steps):
            last = torch.cat([row.next() for row in rows])
            found = decoder.hidden(last, caches=batch)[0]
            pairs += [(found[i : i + 1], row.right[:, row.read - 1 : row.read]) for i, row in enumerate(rows)]
        if leaving is not None:
            leave(batch, rows, leaving)
    return pairs


def join(batch: Sequence[Cache], rows: list[Row], row: Row, own: Sequence[Cache]) -> None:
    by = row.read - batch[0].length if rows else 0
    for cache in batch:
        cache.length = cache.length if rows else row.read
        if by > 0:
            cache.shift(by)
    for other in rows:
        other.padding += max(by, 0)
    row.padding = batch[0].length - row.read
    rows.append(row)
    align(batch, rows)
    for cache, theirs in zip(batch, own, strict=True):
        for held in cache.buffers.values():
            held[len(rows) - 1] = float("nan") if held.is_floating_point() else 255
        cache.put(len(rows) - 1, theirs)


def leave(batch: Sequence[Cache], rows: list[Row], index: int) -> None:
    last = rows.pop()
    if index < len(rows):
        for cache in batch:
            cache.move(len(rows), index)
        rows[index] = last
    common = min(row.padding for row in rows)
    for row in rows:
        row.padding -= common
    for cache in batch:
        cache.shift(-common)
    align(batch, rows)


def align(batch: Sequence[Cache], rows: Sequence[Row]) -> None:
    padding = torch.tensor([row.padding for row in rows], dtype=torch.int64)
    for cache in batch:
        cache.use(len(rows))
        cache.padding = padding


@torch.no_grad()
def alone(decoder: Decoder, ids: Tensor, bits: int | None) -> Tensor:
    """States [1,T,D] of a document in one pass."""
    return states(decoder, ids) if bits is None else decoder.hidden(ids, caches=decoder.new_caches(1, ROOM, bits))[0]


def drawn_alike(decoder: Decoder) -> None:
    """A running batch draws the tokens that each request has alone."""
    batch, jobs = Batch(decoder, 2, ROOM, chunk=4), list[Job]()
    for i, n in enumerate((5, 2, 11, 1)):
        prompt = tokens(1, n, seed=10 + i)[0].tolist()
        jobs.append(batch.add(Job(prompt, 2 + 2 * i, Sampling(float(i % 2)), seed=i)))
        batch.step()
    while batch.busy:
        batch.step()
    for i, job in enumerate(jobs):
        own = Continuations(decoder, [job.prompt], job.new_tokens, job.sampling, seed=job.seed)
        right = [token for (token,) in own]
        must(job.tokens == right, f"request {i + 1} of 4 drew {job.tokens}, not {right}")


def drafts(setting: Setting) -> None:
    """With a cache, exact or of 6 bits, ``rewind(mark(2), keep)`` after two tokens equals never having read those
    beyond ``keep``, for 0, 1 and 2, and for another number in each row, within 3e-5 (with bits the median token, within
    1e-5). Where a row keeps none of a pass, its tokens there are NaN."""
    refuse(setting)
    decoder, ids = setting.decoder(), tokens(3, 14)
    padding = torch.tensor([0, 5, 2], dtype=torch.int64)
    by_row = torch.tensor([0, 2, 1], dtype=torch.int64)
    for bits in known_bits(decoder, (None,) if setting.brief else (None, 6)):
        right = torch.cat([alone(decoder, ids[i : i + 1, n:], bits)[:, -6:] for i, n in enumerate(padding)])
        every: list[tuple[int | Tensor, list[int]]] = [(0, [2]), (1, [1, 1]), (2, [2]), (by_row, [2])]
        for keep, chunks in every[-1:] if setting.brief else every:
            found = redone(decoder, ids, bits, padding, keep, chunks)
            wanted = torch.cat([right[i : i + 1, n : n + 4] for i, n in enumerate(kept_of(keep))])
            must_equal(found, wanted, bits, f"rows that kept {kept_of(keep)} of two tokens")


def must_equal(found: Tensor, right: Tensor, bits: int | None, what: str) -> None:
    """Raise unless states agree: of quantised caches those of the median token, as a value between two codes may round
    either way."""
    if bits is None:
        must_agree(found, right, STEP_BOUND, what)
        return
    off = median_off(found, right)
    must(off <= BOUND, f"{what} at {bits} bits are off by {off:.2e} of a token's norm")


def kept_of(keep: int | Tensor) -> list[int]:
    """Of each of 3 rows."""
    return keep.tolist() if isinstance(keep, Tensor) else [keep] * 3


@torch.no_grad()
def redone(
    decoder: Decoder, ids: Tensor, bits: int | None, padding: Tensor, keep: int | Tensor, chunks: Sequence[int]
) -> Tensor:
    """States [3,4,D] of the four tokens that follow what was kept of two tokens after the first eight."""
    caches = decoder.new_caches(3, ROOM, bits, padding)
    decoder.hidden(ids[:, :8], caches=caches)
    kept = torch.tensor(kept_of(keep), dtype=torch.int64)
    wrong = (ids[:, 8:10] + 7) % MODEL["vocab_size"]
    draft = torch.where(torch.arange(2) < kept[:, None], ids[:, 8:10], wrong)
    marks = [cache.mark(2) for cache in caches]
    for at, part in zip((0, 1), draft.split(list(chunks), 1), strict=False):
        nothing_kept = (kept <= at)[:, None, None]
        decoder.hidden(part, caches=caches, embedded=decoder.look_up(part).masked_fill(nothing_kept, float("nan")))
    for cache, mark in zip(caches, marks, strict=True):
        cache.rewind(mark, keep)
        cache.padding = padding + kept.max() - kept
    rest = torch.cat([ids[i : i + 1, 8 + n : 12 + n] for i, n in enumerate(kept.tolist())])
    return torch.cat([decoder.hidden(part, caches=caches)[0] for part in rest.split([1, 3], 1)], 1)
