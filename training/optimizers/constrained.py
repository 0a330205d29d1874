"""Optimizers whose steps on some weights are made by a constraint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blockwright.training.optimizers.closure import evaluated
from blockwright.training.optimizers.combined import CombinedOptimizer
from blockwright.training.optimizers.constraint import Constraint
from blockwright.training.optimizers.distributed import local, norms, placed


class ConstrainedOptimizer(CombinedOptimizer):
    """Several optimizers, of which a constraint takes the directions for some weights and makes the steps itself.

    A direction is what an optimizer makes of a weight of zero: the decay then adds nothing, and no bit of a short step
    is lost beside a long weight. In a step there is a second copy of the weights that are held.

    Args:
        parts: as in ``CombinedOptimizer``
        constraint: makes the steps
        held: the parameters that it makes them for
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], constraint: Constraint, held: Sequence[Tensor]) -> None:
        super().__init__(parts)
        self.constraint, self.held = constraint, list(held)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "constraint": self.constraint, "held": self.held}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        rates = {parameter: group["lr"] for group in self.param_groups for parameter in group["params"]}
        before = {p: local(p).clone() for p in self.held if p.grad is not None}
        if before:  # none in a step that is skipped
            torch._foreach_zero_([local(p) for p in before])
        super().step()
        for parameter, weight in before.items():
            self._settle(parameter, weight, float(rates[parameter]))
        return loss

    def _settle(self, parameter: Tensor, weight: Tensor, rate: float) -> None:
        """Put a weight where the constraint wants it, whose parameter holds the direction."""
        update, state = local(parameter), self.state[parameter]
        length = partial(norms, parameter=parameter, dims=self.constraint.dims)
        if "radius" not in state:
            state["radius"] = placed(length(weight).to(weight.dtype), parameter, self.constraint.dims)
        radius = local(state["radius"])
        moved = self.constraint.moved(weight, update, rate, radius, length)
        # A matrix that begins at 0, as B of an adapter, has no size to keep: it takes the optimizer's own step.
        update.copy_(torch.where(radius > 0, moved, weight + update))
