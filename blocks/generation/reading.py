"""How the prompt of a job is read, before it has a row of a running batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.drafts.base import Drafts
from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import Draws


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
