"""The contract of ``scores``: turn attention scores into weights, in place of a plain softmax."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.drawn import Drawn
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.remembering import Remembering
from blockwright.registry import family


@family("scores", context=("d_model", "n_heads"))
class Scores(Remembering):
    """A child of attention that replaces ``blockwright.blocks.kernels.attention.causal_attention``.

    It may depend on the tokens that attend, and on what it has noted of each key (blocks/remembering.py). Context:
    ``d_model`` (their width), ``n_heads`` (of the queries).

    A class whose heads depend on each other says ``per_head = False``: such heads are not split over ranks, and no rows
    of the weights are those of one head's scores.
    """

    per_head: ClassVar[bool] = True

    def drawn(self) -> Drawn:
        return Drawn(acts="scores")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        """Attention of the last T of S tokens on all previous ones.

        Args:
            q: [B,T,N,H]
            k: [B,S,K,H]; a ring gives keys in the order in which it stores them
            v: [B,S,K,V]
            scoring: without sinks and cap
            x: [B,T,D], the attention's input
            noted: [B,S,…] for each of its ``slots``

        Returns:
            [B,T,N,V]
        """
        raise NotImplementedError
