"""The contract of ``exit``: after which visit of a loop a token leaves it. A child of ``loop``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.over_ranks import OverRanks
from blockwright.registry import family


@family("exit", context=("visits",), in_layers=False)
class Exit(OverRanks, Block):
    """Gives each visit a probability that the token leaves after it. Context: ``visits``, r.

    In training the loss is the expected one, Σ_t p_t nll_t, and what ``losses`` adds. In evaluation ``choose`` takes
    one visit's state for each token. All visits are computed all the same, so that every visit has a full cache: an
    exit changes which state predicts, and does not save time.
    """

    counted_as: ClassVar[str | None] = "loop"
    # The head's logits of each visit are computed again for the gradient, and recomputation is not counted.
    flops_within: ClassVar[float | None] = 0.06

    def probabilities(self, states: Sequence[Tensor]) -> Tensor:
        """Normalised states of each visit, r of [B,T,D] → probabilities [r,B,T], which add up to 1 over r."""
        raise NotImplementedError

    def losses(self, probabilities: Tensor, real: Tensor | None) -> dict[str, Tensor]:
        """Name → further loss, a mean over tokens (``OverRanks.mean``), already weighted.

        Args:
            probabilities: [r,B,T]
            real: [B,T], which are tokens and not padding; None for all
        """
        return {}

    def choose(self, states: Sequence[Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        """States of each visit, r of [B,T,D] → the state with which each token leaves, [B,T,D].

        Args:
            norm: makes the states that ``probabilities`` reads
        """
        raise NotImplementedError
