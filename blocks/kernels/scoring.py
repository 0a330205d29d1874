"""What stands between q·k and the weights of an attention, beside the causal mask."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scoring(NamedTuple):
    """How scores of the last T of S positions on all that came before them are formed.

    scale: multiplies q·k
    bias: [B|1,N,T,S] added to the scaled scores
    segments: [B,T] document ids, for S = T; tokens of different documents never see each other
    window: a token sees this many tokens, itself included; None for all
    sinks: [N] scores of a key that stands for nothing, one a head
    softcap: bound that a tanh keeps the scaled scores within, before the bias
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
        """Whether the bias is to get a gradient, which only torch's own attention gives it."""
        return self.bias is not None and self.bias.requires_grad
