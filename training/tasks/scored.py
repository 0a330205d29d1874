"""What a task makes of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from blocks.gating.base import Routing


@dataclass(frozen=True)
class Scored:
    """One micro-batch, scored.

    Args:
        total: the objective, a sum over ``count``, with its gradient
        count: how much was scored (tokens, pairs, …): ``total / count`` is the loss
        logged: the sum that is logged as the loss, where that is not ``total``
        terms: further terms of the loss, each a mean of the step already (``Task.step.mean``), with its gradient
        figures: parts of ``total`` to be logged by themselves, means of the step too; not added to the loss
        routings: of each layer, None where none routes: their balance losses and loads are the base class's business
    """

    total: Tensor
    count: Tensor
    logged: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    routings: Sequence[Routing | None] = ()
