"""A running batch, which requests join and leave: continuous batching (Yu et al. 2022, Orca) over every kind of cache.

Rows are aligned on the right, as in ``Continuations``: all have one length, and differ by the padding before their own
tokens. A prompt is read alone, and what its caches hold is then copied to a free row (``Cache.put``). The rows in use
are the first ones: the last row takes the place of one that leaves. Where a newcomer is longer than the batch, or the
room is used up, all rows are shifted. None of this depends on what a cache holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import check_lengths
from blockwright.blocks.generation.sample import Sampling, sample
from blockwright.blocks.input import Media
from blockwright.registry import BlockError

CHUNK = 512  # prompt tokens between two tokens of the running jobs
SPARE = 16  # padding common to all rows that is not worth a shift


class Likelihood(NamedTuple):
    """How likely a token was.

    drawn: log-probability of the token
    likeliest: the likeliest tokens and their log-probabilities, in falling order
    """

    drawn: float
    likeliest: list[tuple[int, float]]


@dataclass(eq=False)
class Job:
    """A request, and its answer so far.

    Args:
        prompt: token ids
        new_tokens: how many to add at most
        sampling: sampling parameters
        seed: of its draws
        stop_tokens: tokens that end it; not part of the answer
        logprobs: number of the likeliest tokens to note at each step, beside the drawn one; None: nothing is noted
        media: what the prompt holds beside text, in order

    Attributes:
        tokens: added so far
        likelihoods: of each of them, by the softmax of the logits as they are, before the sampling changes them
        ended: why it ended, by a stop token, its length or ``Batch.cancel``; None before
    """

    prompt: Sequence[int]
    new_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_tokens: Collection[int] = frozenset()
    logprobs: int | None = None
    media: Media | None = None
    tokens: list[int] = field(default_factory=list, init=False)
    likelihoods: list[Likelihood] = field(default_factory=list, init=False)
    ended: Literal["end", "length", "cancelled"] | None = field(default=None, init=False)


News = tuple[Job, int | None]


class _Row:
    """A job with what its draws need, and its padding once it has a row of the batch."""

    def __init__(self, job: Job, device: torch.device, vocabulary: int) -> None:
        self.job, self.padding = job, 0
        self.generator = torch.Generator(device).manual_seed(job.seed)
        self.seen: Tensor | None = None
        if job.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.seen[list(job.prompt)] = True


class _Reading:
    """A row whose prompt is being read, in caches of one row that are emptied first."""

    def __init__(self, row: _Row, decoder: Decoder, caches: Sequence[Cache]) -> None:
        self.row, self.decoder, self.caches, self.at = row, decoder, caches, 0
        self.tokens = torch.tensor([row.job.prompt], dtype=torch.int64, device=decoder.embedding.weight.device)
        self.embedded = decoder.look_up(self.tokens, row.job.media) if row.job.media else None

    def read(self, n: int) -> tuple[int, Tensor | None]:
        """Read at most n tokens: how many it was, and after the last one the logits [1,V]."""
        part = slice(self.at, self.at + n)
        tokens, embedded = self.tokens[:, part], None if self.embedded is None else self.embedded[:, part]
        hidden = self.decoder.last_hidden(tokens, self.caches, embedded)
        self.at += tokens.shape[1]
        done = self.at == self.tokens.shape[1]
        return tokens.shape[1], self.decoder.logits(hidden[:, -1]).float() if done else None


class Batch:
    """Continues up to ``rows`` jobs at once; others wait in order.

    ::

        batch = Batch(decoder, rows=8, room=2048)
        job = batch.add(Job([5, 3], 20))
        while batch.busy:
            for job, token in batch.step():
                ...  # None: the job has ended

    A job's tokens are those of ``Continuations`` for its prompt alone, with caches of the same ``room`` where rotations
    depend on it. In fp32 and below, logits of a batch differ from those of a row in their last digits, so a near tie
    may fall the other way. All memory is allocated at once, and a job is admitted by the most that it may need: none
    that runs is ever set back. Not supported: threads, of which one has to make all calls; pages shared by rows.

    Args:
        decoder: in evaluation mode
        rows: at once at most
        room: of each row, in tokens that are read: a prompt and its continuation but for the last token
        bits: of the caches, 8, 6 or 4; None for exact ones
        chunk: prompt tokens that are read between two tokens of the running jobs; None for 512

    Attributes:
        steps: passes over the running jobs so far
        shifts: of all rows so far

    Raises:
        BlockError: a block computes rows that depend on each other, or an attention has caches that rows cannot join
    """

    def __init__(
        self, decoder: Decoder, rows: int, room: int, *, bits: int | None = None, chunk: int | None = None
    ) -> None:
        for name, value in (("rows", rows), ("room", room), ("chunk", CHUNK if chunk is None else chunk)):
            if value < 1:
                raise BlockError(name, value, "must be at least 1", "Write 1 or more")
        refuse_dependent_rows(decoder)
        self.decoder, self.rows, self.room, self.chunk = decoder, rows, room, chunk or CHUNK
        self.device = decoder.embedding.weight.device
        self.steps = self.shifts = 0
        self._waiting: deque[_Row] = deque()
        self._reading: _Reading | None = None
        self._running: list[_Row] = []
        with torch.inference_mode():  # what is made in it can be changed in it alone
            self._caches, self._own = (joinable_caches(decoder, n, room, bits) for n in (rows, 1))
            self._empty = [cache.mark() for cache in self._own]
        self._align()

    @property
    def nbytes(self) -> int:
        """Bytes of all caches: of every row, and of one that is being read. They never change."""
        return sum(cache.nbytes for cache in (*self._caches, *self._own))

    @property
    def busy(self) -> bool:
        """Whether a job waits, is read or runs."""
        return bool(self._waiting or self._reading or self._running)

    @property
    def running(self) -> list[Job]:
        """The jobs that have a row."""
        return [row.job for row in self._running]

    def add(self, job: Job) -> Job:
        """Queue a job, and return it.

        Raises:
            BlockError: it can never run: it has no prompt, or unknown tokens, or needs more room or positions
        """
        self._refuse(job)
        self._waiting.append(_Row(job, self.device, len(self.decoder.output_weight)))
        return job

    def _refuse(self, job: Job) -> None:
        vocabulary = len(self.decoder.output_weight)
        check_lengths(self.decoder, [job.prompt], job.new_tokens)
        if job.new_tokens < 1:
            raise BlockError("new_tokens", job.new_tokens, "must be at least 1", "Write 1 or more")
        if (total := len(job.prompt) + job.new_tokens) > self.room + 1:
            rule = f"the prompt and new tokens are {total}, and a row has room for {self.room + 1}"
            most = self.room + 1 - len(job.prompt)
            remedy = f"Request at most {most}" if most > 0 else f"Shorten the prompt to {self.room} tokens or fewer"
            raise BlockError("new_tokens", job.new_tokens, rule, remedy)
        if unknown := [token for token in job.prompt if not 0 <= token < vocabulary]:
            rule = f"is no token of a vocabulary of {vocabulary}"
            raise BlockError("prompt", unknown[0], rule, f"Write ids from 0 to {vocabulary - 1}")
        if job.logprobs is not None and not 0 <= job.logprobs <= vocabulary:
            raise BlockError("logprobs", job.logprobs, f"is a number of tokens, of {vocabulary}", "Write 0 or more")
        if not -(2**63) <= job.seed < 2**63:
            raise BlockError("seed", job.seed, "must fit 64 bits", "Write a number from 0 to 2**63 - 1")
        self.decoder.check_places(list(job.prompt), job.media)

    @torch.inference_mode()
    def cancel(self, job: Job) -> None:
        """End a job wherever it is, without news of it; nothing if it has ended."""
        if job.ended is not None:
            return
        job.ended = "cancelled"
        if self._reading is not None and self._reading.row.job is job:
            self._reading = None
        elif job in (running := self.running):
            self._leave(running.index(job))
        else:
            self._waiting = deque(row for row in self._waiting if row.job is not job)

    @torch.inference_mode()
    def step(self) -> list[News]:
        """Read ``chunk`` tokens of prompts where rows are free, then decode a token of every running job.

        Returns:
            each new token with its job, in order; None in place of a token once a job has ended
        """
        return self._read() + (self._decode() if self._running else [])

    def _read(self) -> list[News]:
        news, left = list[News](), self.chunk
        while left and (reading := self._next()):
            n, logits = reading.read(left)
            left -= n
            if logits is not None:
                self._reading = None
                news += self._draw([reading.row], logits)
                if reading.row.job.ended is None:
                    self._join(reading.row)
        return news

    def _next(self) -> _Reading | None:
        """The prompt that is being read, or the next one if a row is free."""
        if self._reading is None and self._waiting and len(self._running) < self.rows:
            for cache, empty in zip(self._own, self._empty, strict=True):
                cache.rewind(empty)
            self._reading = _Reading(self._waiting.popleft(), self.decoder, self._own)
        return self._reading

    def _decode(self) -> list[News]:
        self.steps += 1
        self._drop_padding()
        last = torch.tensor([[row.job.tokens[-1]] for row in self._running], device=self.device)
        hidden = self.decoder.last_hidden(last, self._caches)
        news = self._draw(self._running, self.decoder.logits(hidden[:, -1]).float())
        for i in reversed(range(len(self._running))):
            if self._running[i].job.ended:
                self._leave(i)
        return news

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def _length(self) -> int:
        return self._caches[0].length

    def _join(self, row: _Row) -> None:
        """Give a row to a job whose prompt has been read."""
        n = self._own[0].length
        if not self._running:  # the batch begins where the newcomer ends
            for cache in self._caches:
                cache.length = n
        elif n > self._length:
            self._shift(n - self._length)
        row.padding = self._length - n
        self._running.append(row)
        self._align()
        for cache, own in zip(self._caches, self._own, strict=True):
            cache.put(len(self._running) - 1, own)

    def _leave(self, index: int) -> None:
        last = self._running.pop()
        if index < len(self._running):
            for cache in self._caches:
                cache.move(len(self._running), index)
            self._running[index] = last
        self._align()

    def _drop_padding(self) -> None:
        """Make room at the end where there is none, or where much of the rows is padding that all have: at most once
        for a row that left, as the row of fewest padding then has none."""
        common = min(row.padding for row in self._running)
        if common and (self._length == self.room or common > max(SPARE, self._length // 4)):
            self._shift(-common)
            self._align()

    def _shift(self, by: int) -> None:
        self.shifts += 1
        for cache in self._caches:
            cache.shift(by)
        for row in self._running:
            row.padding += by

    def _align(self) -> None:
        """Give the caches the rows in use and their padding."""
        of_rows = [row.padding for row in self._running]
        padding = torch.tensor(of_rows, dtype=torch.int64, device=self.device) if any(of_rows) else None
        for cache in self._caches:
            cache.use(len(of_rows))
            cache.padding = padding

    # --- draws --------------------------------------------------------------------------------------------------------

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> list[News]:
        """Draw a token for each row from logits [B,V]: together for those of equal sampling."""
        groups: dict[Sampling, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.job.sampling, []).append(i)
        tokens = [0] * len(rows)
        for sampling, members in groups.items():
            some = logits if len(groups) == 1 else logits[members]
            seen = [row.seen for i in members if (row := rows[i]).seen is not None]
            generators = [rows[i].generator for i in members]
            drawn = sample(some, sampling, generators, torch.stack(seen) if seen else None).tolist()
            for i, token in zip(members, drawn, strict=True):
                tokens[i] = token
        _note_likelihoods([row.job for row in rows], tokens, logits)
        return [news for row, token in zip(rows, tokens, strict=True) for news in _received(row, token)]


def _received(row: _Row, token: int) -> list[News]:
    """Add a drawn token to a job: the news of it."""
    job = row.job
    if token in job.stop_tokens:
        job.ended = "end"
        return [(job, None)]
    job.tokens.append(token)
    if row.seen is not None:
        row.seen[token] = True
    if len(job.tokens) < job.new_tokens:
        return [(job, token)]
    job.ended = "length"
    return [(job, token), (job, None)]


def _note_likelihoods(jobs: Sequence[Job], tokens: Sequence[int], logits: Tensor) -> None:
    """Note how likely the drawn tokens are by logits [B,V], for the jobs that want it."""
    wanted = [i for i, job in enumerate(jobs) if job.logprobs is not None and tokens[i] not in job.stop_tokens]
    if not wanted:
        return
    logp = logits[wanted].log_softmax(-1)
    best = logp.topk(max(jobs[i].logprobs or 0 for i in wanted))
    drawn = logp.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=logp.device))[:, 0].tolist()
    for i, own, ids, values in zip(wanted, drawn, best.indices.tolist(), best.values.tolist(), strict=True):
        jobs[i].likelihoods.append(Likelihood(own, list(zip(ids, values, strict=True))[: jobs[i].logprobs]))


def refuse_dependent_rows(decoder: Decoder) -> None:
    """Refuse a decoder in which a row changes what another gets.

    Raises:
        BlockError
    """
    for name, block in decoder.named_modules():
        if isinstance(block, Block) and not block.independent:
            rule = "what a row gets depends on the other rows, so requests that come and go would change each other"
            raise BlockError(name, type(block).__name__, rule, "Choose another block, or generate rows one by one")


def joinable_caches(decoder: Decoder, rows: int, room: int, bits: int | None) -> list[Cache]:
    """``Decoder.new_caches`` of rows that may join and leave.

    Raises:
        BlockError: an attention keeps no cache, or one of a class that is no ``Cache``
    """
    try:
        caches = decoder.new_caches(rows, room, bits)
    except NotImplementedError:
        rule = "an attention of this model keeps no cache, which rows could join"
        raise BlockError("attention", None, rule, "Choose another attention, or give it new_cache") from None
    for i, (layer, cache) in enumerate(zip(decoder.layers, caches, strict=True)):
        if not isinstance(cache, Cache):
            rule = f"{type(layer.attention).__name__} keeps a {type(cache).__name__}, which rows cannot join"
            remedy = "Derive it from blockwright.blocks.cache.base.Cache, or generate rows one by one"
            raise BlockError(f"layers.{i}.attention", type(cache).__name__, rule, remedy)
    return caches
