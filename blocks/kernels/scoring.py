"""How attention scores are computed between q·k and the softmax, in addition to the causal mask."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scoring(NamedTuple):
    """Computation of the scores of the last T of S positions on all previous ones.

    scale: multiplies q·k
    bias: [B|1,N,T,S] added to the scaled scores
    segments: [B,S] document ids of the keys, the last T those of the queries, a document in one run; tokens of
        different documents never see each other
    window: number of last tokens a token sees, itself included; None for all
    sinks: [N] scores of a key without a value, one per head
    softcap: bound of the scaled scores, by a tanh, before the bias
    """

    scale: float
    bias: Tensor | None = None
    segments: Tensor | None = None
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the scale."""
        return all(part is None for part in self[1:])

    @property
    def learns_bias(self) -> bool:
        """Whether the bias needs a gradient, which only torch's own attention computes."""
        return self.bias is not None and self.bias.requires_grad
