"""How attention scores are computed between q·k and the softmax, in addition to the causal mask."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Slopes(NamedTuple):
    """A bias that falls with distance, −slope · max(0, query's position − key's position), not yet computed: at [N,T,S]
    numbers it would be far larger than what it is computed from.

    slopes: [N] fp32, one per head
    queries: [B|1,T] positions
    keys: [B|1,S] positions
    """

    slopes: Tensor
    queries: Tensor
    keys: Tensor


def dense(bias: Tensor | Slopes | None) -> Tensor | None:
    """A bias as a tensor, [B|1,N,T,S], for implementations that add one."""
    if not isinstance(bias, Slopes):
        return bias
    distance = (bias.queries[:, :, None] - bias.keys[:, None, :]).clamp(min=0).float()
    return -bias.slopes[:, None, None] * distance[:, None]


def of_heads(bias: Tensor | Slopes, heads: slice) -> Tensor | Slopes:
    """The part of a bias that belongs to some of the heads."""
    if isinstance(bias, Slopes):
        return bias._replace(slopes=bias.slopes[heads])
    return bias if bias.shape[1] == 1 else bias[:, heads]


class Scoring(NamedTuple):
    """Computation of the scores of the last T of S positions on all previous ones.

    scale: multiplies q·k
    bias: [B|1,N,T,S] added to the scaled scores, or the slopes to compute it from
    segments: [B,S] document ids of the keys, the last T those of the queries, a document in one run; tokens of
        different documents never see each other
    window: number of last tokens a token sees, itself included; None for all
    sinks: [N] scores of a key without a value, one per head
    softcap: bound of the scaled scores, by a tanh, before the bias
    """

    scale: float
    bias: Tensor | Slopes | None = None
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
        of = self.bias.slopes if isinstance(self.bias, Slopes) else self.bias
        return of is not None and of.requires_grad
