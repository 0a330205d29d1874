"""The result of scoring a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from blockwright.blocks.gating.base import Routing


@dataclass(frozen=True)
class Scored:
    """One scored micro-batch.

    Args:
        total: the objective, a sum over ``count``, with its gradient
        count: number of scored items (tokens, pairs, …): ``total / count`` is the loss
        logged: the sum to log as the loss, if not ``total``
        terms: further terms of the loss, each already a mean of the step (``Task.step.mean``), with its gradient
        figures: parts of ``total`` to log separately, also means of the step; not added to the loss
        routings: of each layer, None where none routes; the base class handles their balance losses and loads
    """

    total: Tensor
    count: Tensor
    logged: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    routings: Sequence[Routing | None] = ()
