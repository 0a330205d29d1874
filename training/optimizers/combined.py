"""Several optimizers combined into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from blockwright.training.optimizers.closure import evaluated


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
