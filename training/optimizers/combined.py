"""Several optimizers combined into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blockwright.training.optimizers.distributed import local, norms, placed
from blockwright.training.optimizers.recipe import Constraint

# --- the closure that a trainer gives an optimizer's step, which computes the loss and its gradients ---


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss of a closure, computed with gradients within a step that has none; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class CombinedOptimizer(torch.optim.Optimizer):
    """One `torch.optim.Optimizer` whose parameter groups are stepped by different algorithms.

    The groups of the parts, in order, *are* the groups of the whole: the same dicts, so that a scheduler's change of
    `param_groups[i]["lr"]` reaches the part. The state is one mapping shared by all. `state_dict` is therefore the
    ordinary one, with parameters numbered consecutively, and compatible with checkpoint tools for `torch.optim`.

    Args:
        parts: optimizers over disjoint sets of parameters. They belong to this object afterwards: step only this one

    Adding a group later is not supported, since its part would be unknown.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts: list[torch.optim.Optimizer] = []  # empty while the base class collects the groups
        # The base class refuses a parameter that is in two groups.
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def _share(self) -> None:
        """Make the parts use this object's groups and state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            own = [next(groups) for _ in part.param_groups]
            # Through the part's own __setstate__, in which AdamW adds what older checkpoints lack.
            part.__setstate__({"state": self.state, "param_groups": own})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict` with new groups and state, and by copying and unpickling with everything."""
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.parts:
            raise NotImplementedError("a group must say which part steps it: build the optimizer of the whole model")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        for part in self.parts:
            part.step()
        return loss


# --- optimizers whose steps on some weights are made by a constraint ---


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
