"""The contract of drafts: guesses of the next tokens of rows, which the model checks in one pass.

A draft is drawn with a copy of the draws that the row's own token is then drawn with (``Draws.copy``), and counts where
both agree. So a row's tokens are those without drafts, for the same seed, whatever the draft and the sampling: there is
no residual distribution, and no second stream of random numbers. What was computed for a wrong draft, and after it, is
taken back from the caches (``Cache.rewind``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Draws, draw_each
from blockwright.registry import BlockError

MOST = 64  # drafts of a pass: every row has memory for as many tokens more, and few are ever right


class Checked(NamedTuple):
    """What the model has computed for the rows since their last drafts.

    hidden: [B,T,D] states of tokens
    tokens: [B,T] the token after each of them
    kept: number of them that count, from the first, for each row; T for one row at least
    texts: every token of each row so far
    """

    hidden: Tensor
    tokens: Tensor
    kept: Sequence[int]
    texts: Sequence[Sequence[int]]

    @property
    def last(self) -> Tensor:
        """[B] index of the last that counts."""
        return torch.tensor(self.kept, device=self.tokens.device, dtype=torch.int64) - 1


class Drafts:
    """The drafts of the rows of one batch; this class makes none.

    Its caches, where it has some, follow the batch: rows join, move, leave and are shifted in all of them alike.

    Attributes:
        reads_states: whether it needs the states of every token of a prompt
        caches: what it remembers of each row
        lags: tokens at the start of a row that a cache never holds, in the order of ``caches``
    """

    reads_states: ClassVar[bool] = False
    caches: Sequence[Cache] = ()
    lags: Sequence[int] = ()

    def begin(self, first: Tensor) -> None:
        """Begin rows with their first tokens [B,1]."""

    def read(self, hidden: Tensor, tokens: Tensor) -> None:
        """Follow a part of prompts, all of which counts.

        Args:
            hidden: [B,T,D] states of tokens, where the drafts read states
            tokens: [B,T] the token after each of them
        """

    def propose(self, checked: Checked, draws: Sequence[Draws], most: int) -> list[list[int]]:
        """Follow what has been checked, and draft ``most`` tokens of each row at most.

        Args:
            checked: of every row of ``align``, since the last call
            draws: copies of the rows' own
            most: 0 to follow only
        """
        return [[] for _ in checked.kept]

    def align(self, padding: Sequence[int], device: torch.device) -> None:
        """Use as many rows, with so much padding before each."""
        for cache, lag in zip(self.caches, self.lags, strict=True):
            cache.use(len(padding))
            cache.padding = as_padding([n + lag for n in padding], device)


class Drafter:
    """Where drafts come from; this class drafts nothing.

    Attributes:
        tokens: drafted for one pass of the model at most
    """

    tokens: int = 0

    def new(self, decoder: Decoder, rows: int, room: int, bits: int | None) -> Drafts:
        """The drafts of a batch.

        Args:
            decoder: the model that checks them
            rows, room, bits: as of ``Batch``

        Raises:
            BlockError: they do not suit the model
        """
        return Drafts()


def draw_drafts(draws: Sequence[Draws], logits: Tensor) -> list[int]:
    """A draft of each row from logits [B,V]. From those that are not finite it is any token: all drafts are checked."""
    return draw_each(draws, logits.float().nan_to_num(posinf=0.0))


def check_tokens(tokens: int) -> None:
    """Check a number of drafts.

    Raises:
        BlockError
    """
    if not 1 <= tokens <= MOST:
        raise BlockError("draft_tokens", tokens, f"must be 1 to {MOST}", "Write e.g. 4, or leave it out")


def as_padding(of_rows: Sequence[int], device: torch.device) -> Tensor | None:
    """[B] for a cache; None where no row has any."""
    return torch.tensor(of_rows, dtype=torch.int64, device=device) if any(of_rows) else None


def next_positions(decoder: Decoder, n: int, cache: Cache) -> Tensor:
    """[B|1,n] of the next n tokens. Those of drafts that are never kept may be past the last position: they get it."""
    device, limit = decoder.embedding.weight.device, decoder.position.limit
    positions = torch.arange(cache.length, cache.length + n, device=device)[None]
    if cache.padding is not None:
        positions = (positions - cache.padding[:, None]).clamp(min=0)
    return positions if limit is None else positions.clamp(max=limit - 1)
