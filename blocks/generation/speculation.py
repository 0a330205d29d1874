"""Speculative decoding: ``Continuations`` in fewer passes of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts import Drafter
from blockwright.blocks.generation.generate import check_lengths
from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import Acceptance, NotFiniteError, Sampling


class Speculation:
    """The tokens of ``Continuations``, with drafts of those to come: each pass checks them all.

    Rows get ahead of each other, as drafts are right for some and not for others; tokens come when every row has one.

    Args:
        decoder, prompts, new_tokens, sampling, seed, stop_tokens, bits: as of ``Continuations``
        drafts: where they come from

    Raises:
        BlockError: as of ``Continuations`` and ``Batch``
        NotFiniteError: from the iterator, as of ``sample``
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling | None = None,
        *,
        drafts: Drafter,
        seed: int = 0,
        stop_tokens: Collection[int] = (),
        bits: int | None = None,
    ) -> None:
        check_lengths(decoder, prompts, new_tokens)
        room = max(max(map(len, prompts)) + new_tokens - 1, 1)
        stops, how = frozenset(stop_tokens), sampling or Sampling()
        self._batch = Batch(decoder, len(prompts), room, bits=bits, drafts=drafts)
        jobs = (Job(prompt, new_tokens, how, seed + i, stops) for i, prompt in enumerate(prompts))
        self._jobs = [self._batch.add(job) for job in jobs]
        self._at = 0  # tokens of each row that have been returned

    @property
    def acceptance(self) -> Acceptance:
        """Of the drafts so far."""
        return self._batch.acceptance

    @property
    def ended(self) -> list[bool]:
        """Of each row, whether it has no more tokens."""
        return [job.ended in ("end", "cancelled") and self._at >= len(job.tokens) for job in self._jobs]

    def __iter__(self) -> Iterator[list[int | None]]:
        return self

    def __next__(self) -> list[int | None]:
        while any(job.ended is None and len(job.tokens) <= self._at for job in self._jobs):
            self._batch.step()
        if any(job.ended == "failed" for job in self._jobs):
            raise NotFiniteError
        tokens = [job.tokens[self._at] if self._has_more(job) else None for job in self._jobs]
        if not any(map(self._has_more, self._jobs)):
            raise StopIteration
        self._at += 1
        return tokens

    def _has_more(self, job: Job) -> bool:
        return job.ended != "cancelled" and self._at < len(job.tokens)

    def end(self, row: int) -> None:
        """Stop a row whose text has ended."""
        job = self._jobs[row]
        self._batch.cancel(job)
        del job.tokens[self._at :]
