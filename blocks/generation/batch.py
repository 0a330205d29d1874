"""A running batch, which requests join and leave: continuous batching (Yu et al. 2022, Orca) over every kind of cache.

Rows are aligned on the right, as in ``Continuations``: all have one length, and differ by the padding before their own
tokens. A prompt is read alone, and what its caches hold is then copied to a free row (``Cache.put``). The rows in use
are the first ones: the last row takes the place of one that leaves. Where a newcomer is longer than the batch, or the
room is used up, all rows are shifted. None of this depends on what a cache holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.drafts import Checked, Drafter, Drafts, as_padding, next_positions
from blockwright.blocks.generation.generate import check_lengths
from blockwright.blocks.generation.job import Job, News, joinable_caches, note_likelihoods, refuse_dependent_rows
from blockwright.blocks.generation.sample import Acceptance, Draws, draw_each, drawable
from blockwright.blocks.position.base import boundaries
from blockwright.registry import BlockError

# --- how the prompt of a job is read, before it has a row of a running batch ------------------------------------------


class Row:
    """A job with its draws, the drafts of its next tokens, and its padding once it has a row of the batch."""

    def __init__(self, job: Job, device: torch.device, vocabulary: int) -> None:
        self.job, self.padding = job, 0
        self.draws = Draws.of(job.sampling, job.seed, job.prompt, vocabulary, device)
        self.drafts: list[int] = []
        self.needed = len(job.prompt) + job.new_tokens - 1  # tokens that are read at most: the last one never is

    @property
    def text(self) -> list[int]:
        return [*self.job.prompt, *self.job.tokens]

    @property
    def left(self) -> int:
        """Tokens that the job may still add."""
        return 0 if self.job.ended else self.job.new_tokens - len(self.job.tokens)

    def agrees(self, i: int) -> bool:
        """Whether the job runs, and its last token is draft i."""
        return self.job.ended is None and self.drafts[i : i + 1] == self.job.tokens[-1:]


class Reading:
    """A row whose prompt is being read, in caches of one row that are emptied first."""

    def __init__(self, row: Row, decoder: Decoder, caches: Sequence[Cache], drafts: Drafts) -> None:
        self.row, self.decoder, self.caches, self.drafts, self.at = row, decoder, caches, drafts, 0
        self.tokens = torch.tensor([row.job.prompt], dtype=torch.int64, device=decoder.embedding.weight.device)
        self.embedded = decoder.look_up(self.tokens, row.job.media) if row.job.media else None
        drafts.begin(self.tokens[:, :1])

    @property
    def done(self) -> bool:
        return self.at == self.tokens.shape[1]

    def read(self, n: int) -> Tensor:
        """Read at most n tokens: the state of the last, [1,1,D]. Drafts follow all whose next token is known."""
        part = slice(self.at, self.at + n)
        tokens, embedded = self.tokens[:, part], None if self.embedded is None else self.embedded[:, part]
        if self.drafts.reads_states:
            hidden, _ = self.decoder.hidden(tokens, caches=self.caches, embedded=embedded)
        else:
            hidden = self.decoder.last_hidden(tokens, self.caches, embedded)
        self.at += tokens.shape[1]
        following = self.tokens[:, part.start + 1 : self.at + 1]
        if known := following.shape[1]:
            self.drafts.read(hidden[:, :known], following)
        return hidden[:, -1:]


CHUNK = 512  # prompt tokens between two tokens of the running jobs
SPARE = 16  # padding common to all rows that is not worth a shift


class Batch:
    """Continues up to ``rows`` jobs at once; others wait in order.

    ::

        batch = Batch(decoder, rows=8, room=2048)
        job = batch.add(Job([5, 3], 20))
        while batch.busy:
            for job, token in batch.step():
                ...  # None: the job has ended

    A job's tokens are those of ``Continuations`` for its prompt alone. In fp32 and below, logits of a batch differ from
    those of a row in their last digits, so a near tie may fall the other way. A job whose logits are not finite fails
    alone. All memory is allocated at once, and a job is admitted by the most that it may need: none that runs is ever
    set back. Not supported: threads, of which one has to make all calls; pages shared by rows.

    Args:
        decoder: in evaluation mode
        rows: at once at most
        room: of each row, in tokens that are read: a prompt and its continuation but for the last token
        bits: of the caches, 8, 6 or 4; None for exact ones
        chunk: prompt tokens that are read between two tokens of the running jobs; None for 512
        drafts: where drafts of the next tokens come from, which a step checks; they change no token. None for none

    Attributes:
        steps: passes over the running jobs so far
        shifts: of all rows so far
        acceptance: of drafts so far
        drafted_at_most: tokens of a row in a pass; 0 without drafts

    Raises:
        BlockError: a block computes rows that depend on each other, an attention has caches that rows cannot join, or
            the drafts do not suit the model, or the caches take more memory than there is
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        room: int,
        *,
        bits: int | None = None,
        chunk: int | None = None,
        drafts: Drafter | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("room", room), ("chunk", CHUNK if chunk is None else chunk)):
            if value < 1:
                raise BlockError(name, value, "must be at least 1", "Write 1 or more")
        refuse_dependent_rows(decoder)
        self.decoder, self.rows, self.room, self.chunk = decoder, rows, room, chunk or CHUNK
        self.device = decoder.embedding.weight.device
        self.steps = self.shifts = 0
        self.acceptance = Acceptance()
        self._waiting: deque[Row] = deque()
        self._reading: Reading | None = None
        self._running: list[Row] = []
        with torch.inference_mode():  # what is made in it can be changed in it alone
            drafter = drafts or Drafter()
            self._of_model, own = (joinable_caches(decoder, n, room, bits, drafter.tokens) for n in (rows, 1))
            self._drafts, self._own_drafts = (drafter.new(decoder, n, room, bits) for n in (rows, 1))
            self._caches, self._own = [*self._of_model, *self._drafts.caches], [*own, *self._own_drafts.caches]
            self._own_drafts.align([0], self.device)
            self._of_lengths = bool(boundaries(decoder))  # whether rotations depend on what a row needs
            self._empty = [cache.mark() for cache in self._own]
        self.drafted_at_most = drafter.tokens
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
        self._waiting.append(Row(job, self.device, len(self.decoder.output_weight)))
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
        """Read ``chunk`` tokens of prompts where rows are free, then decode a token of every running job, and those
        after it that were drafted right.

        Returns:
            each new token with its job, in order; None in place of a token once a job has ended
        """
        return self._read() + (self._decode() if self._running else [])

    def _read(self) -> list[News]:
        news, left = list[News](), self.chunk
        while left and (reading := self._next()):
            before = reading.at
            hidden = reading.read(left)
            left -= reading.at - before
            if reading.done:
                self._reading = None
                news += self._draw([reading.row], self.decoder.logits(hidden[:, -1]).float())
                if reading.row.job.ended is None:
                    self._draft(self._own_drafts, [reading.row], hidden, [1])
                    self._join(reading.row)
        return news

    def _next(self) -> Reading | None:
        """The prompt that is being read, or the next one if a row is free."""
        if self._reading is None and self._waiting and len(self._running) < self.rows:
            for cache, empty in zip(self._own, self._empty, strict=True):
                cache.rewind(empty)
            caches, row = self._own[: len(self._of_model)], self._waiting.popleft()
            for cache in self._own if self._of_lengths else ():
                cache.declared = row.needed
            self._reading = Reading(row, self.decoder, caches, self._own_drafts)
        return self._reading

    def _decode(self) -> list[News]:
        rows, n = self._running, 1 + max(len(row.drafts) for row in self._running)
        # Make room for n tokens at the end where there is none, or where much of the rows is padding that all
        # have: at most once for a row that left, as the row of fewest padding then has none
        common = min(row.padding for row in self._running)
        if common and (self._length + n > self.room + self.drafted_at_most or common > max(SPARE, self._length // 4)):
            self._shift(-common)
            self._align()
        marks = [cache.mark(n) for cache in self._of_model] if n > 1 else []
        hidden, logits = self._computed(n)
        if marks and not all(drawable(logits.flatten(0, 1))):
            # Within a pass a number that is not finite reaches the tokens before it, too. So drafts are left out: what
            # fails then has failed by itself.
            for cache, mark in zip(self._of_model, marks, strict=True):
                cache.rewind(mark)
            for row in rows:
                row.drafts = []
            marks, (hidden, logits) = [], self._computed(1)
        news, kept = self._check(logits)
        for cache, mark in zip(self._of_model, marks, strict=False):
            cache.rewind(mark, torch.tensor(kept, dtype=torch.int64))
        self._draft(self._drafts, rows, hidden, kept)
        for row, own in zip(rows, kept, strict=True):
            row.padding += max(kept) - own
        for i in reversed(range(len(rows))):
            if rows[i].job.ended:
                self._leave(i)
        self._align()
        return news

    def _computed(self, n: int) -> tuple[Tensor, Tensor]:
        """A pass over the last token of each row and its drafts, n together: states [B,n,D] and logits [B,n,V]."""
        self.steps += 1
        read = [_filled_up([row.job.tokens[-1], *row.drafts], n) for row in self._running]
        tokens = torch.tensor(read, device=self.device, dtype=torch.int64)
        positions = next_positions(self.decoder, n, self._of_model[0])
        hidden, _ = self.decoder.hidden(tokens, positions, caches=self._of_model)
        return hidden, self.decoder.logits(hidden).float()

    def _check(self, logits: Tensor) -> tuple[list[News], list[int]]:
        """Draw tokens of each row from logits [B,n,V] as long as its drafts are these tokens; how many it was."""
        news, kept = list[News](), [0] * len(self._running)
        rows = list(range(len(self._running)))
        for i in range(logits.shape[1]):
            news += self._draw([self._running[row] for row in rows], logits[rows, i])
            for row in rows:
                kept[row] += 1
            rows = [row for row in rows if self._running[row].agrees(i)]
            if not rows:
                break
        self.acceptance.count(kept, [len(row.drafts) for row in self._running])
        return news, kept

    def _draft(self, drafts: Drafts, rows: Sequence[Row], hidden: Tensor, kept: Sequence[int]) -> None:
        """Draft the next tokens of rows, after the first ``kept`` of the states [B,T,D]."""
        if not self.drafted_at_most or not any(row.left for row in rows):
            return
        texts, most = [row.text for row in rows], max(kept)
        later = [_filled_up(text[-own:], most) for text, own in zip(texts, kept, strict=True)]
        checked = Checked(hidden[:, :most], torch.tensor(later, device=self.device, dtype=torch.int64), kept, texts)
        proposed = drafts.propose(checked, [row.draws.copy() for row in rows], max(row.left for row in rows) - 1)
        for row, own in zip(rows, proposed, strict=True):
            row.drafts = own[: max(row.left - 1, 0)]

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def _length(self) -> int:
        return self._caches[0].length

    def _join(self, row: Row) -> None:
        """Give a row to a job whose prompt has been read."""
        n = self._own[0].length
        if not self._running:  # the batch begins where the newcomer ends
            for cache, own in zip(self._caches, self._own, strict=True):
                cache.length = own.length
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

    def _shift(self, by: int) -> None:
        self.shifts += 1
        for cache in self._caches:
            cache.shift(by)
        for row in self._running:
            row.padding += by

    def _align(self) -> None:
        """Give the caches the rows in use and their padding."""
        of_rows = [row.padding for row in self._running]
        padding = as_padding(of_rows, self.device)
        for cache in self._of_model:
            cache.use(len(of_rows))
            cache.padding = padding
        self._drafts.align(of_rows, self.device)
        if self._of_lengths:
            needed = torch.tensor([row.needed for row in self._running], dtype=torch.int64, device=self.device)
            for cache in self._caches:
                cache.declared = needed

    # --- draws --------------------------------------------------------------------------------------------------------

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> list[News]:
        """Draw a token for each row from logits [B,V]; rows for which none can be drawn fail."""
        news, sound = list[News](), drawable(logits)
        if not all(sound):
            news = [each for row, good in zip(rows, sound, strict=True) if not good for each in row.job.fail()]
            rows, logits = [row for row, good in zip(rows, sound, strict=True) if good], logits[sound]
        tokens = draw_each([row.draws for row in rows], logits)
        note_likelihoods([row.job for row in rows], tokens, logits)
        return news + [each for row, token in zip(rows, tokens, strict=True) for each in row.job.receive(token)]


def _filled_up(tokens: list[int], n: int) -> list[int]:
    """n tokens, of which the last ones are never kept. They are the row's own, since what is computed for them is."""
    return [*tokens, *tokens[-1:] * (n - len(tokens))]
