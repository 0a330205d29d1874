"""The contract of ``scores``: turn attention scores into weights, in place of a plain softmax."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.registry import family


@family("scores", context=("n_heads",))
class Scores(Block):
    """A child of attention that replaces ``blockwright.blocks.kernels.attention.causal_attention``.

    A class whose heads depend on each other says ``per_head = False``: such heads are not split over ranks, and no rows
    of the weights are those of one head's scores.
    """

    per_head: ClassVar[bool] = True

    def drawn(self) -> Drawn:
        return Drawn(acts="scores")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Queries [B,T,N,H], keys [B,S,K,H], values [B,S,K,V] → [B,T,N,V]; ``scoring`` comes without sinks and cap."""
        raise NotImplementedError
