"""Means over the tokens of a batch of which each rank has some, without padding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """Processes that compute some of the tokens each.

    Attributes:
        number: of them
    """

    number: int

    def sum(self, value: Tensor) -> Tensor:
        """Σ over them, without a gradient."""


class Alone:
    """The only process."""

    number = 1

    def sum(self, value: Tensor) -> Tensor:
        return value


class OverRanks:
    """A block with losses that are means over tokens. A rank's mean is not that of all, for ranks have unequal numbers
    of tokens: ``over_batch`` and ``mean`` are what the losses of the ranks must be for their average to be it.

    Attributes:
        batch_ranks: those with tokens of the batch; multi-rank training sets them
        sequence_ranks: those of them with tokens of the same sequences
    """

    batch_ranks: Ranks = Alone()
    sequence_ranks: Ranks = Alone()

    def over_batch(self, counts: Tensor, values: Tensor, real: Tensor | None) -> Tensor:
        """Σ_i counts_i / tokens · (mean of values over the tokens)_i, of all sequences together.

        Args:
            counts: [n], of the tokens of all sequences
            values: [B,T,n]
            real: [B,T], as in ``forward``
        """
        counts, n_tokens, factor = self._of_all(counts, tokens_of(values, real))
        return (counts / n_tokens * sums_of(values, real).sum(0) * factor).sum()

    def mean_of(self, total: Tensor, tokens: Tensor) -> Tensor:
        """The mean over the tokens of all sequences, from the sum over this rank's.

        Args:
            total: that sum
            tokens: [B,1], how many of each sequence are in it
        """
        return total * self._of_all(tokens.new_empty(0), tokens)[2]

    def _of_all(self, counts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts and tokens of all ranks, and the factor on a sum over this rank's tokens."""
        rows = (self.sequence_ranks.sum(tokens) > 0).sum().to(tokens.dtype)  # ranks are averaged with these weights
        sums = self.batch_ranks.sum(torch.cat((counts, tokens.sum()[None], rows[None])))
        n_tokens, all_rows = sums[-2].clamp(min=1), sums[-1]
        return sums[:-2], n_tokens, all_rows / (rows.clamp(min=1) * n_tokens)

    def mean(self, values: Tensor, real: Tensor | None) -> Tensor:
        """The mean of values [B,T] over the tokens of all sequences."""
        values = values[..., None]
        return self.over_batch(tokens_of(values, real).sum()[None], values, real)


def tokens_of(values: Tensor, real: Tensor | None) -> Tensor:
    """How many tokens each sequence has, [B,1] in the dtype of values [B,T,n]."""
    if real is None:
        return values.new_full((len(values), 1), values.shape[1])
    return real.sum(1, keepdim=True).to(values.dtype)


def sums_of(values: Tensor, real: Tensor | None) -> Tensor:
    """Sums of values [B,T,n] over the tokens of each sequence, [B,n]."""
    return (values if real is None else values.masked_fill(~real[..., None], 0)).sum(1)
