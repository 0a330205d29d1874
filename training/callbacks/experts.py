"""Warn of unused experts and collapsed routers during training."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count, ProperFraction
from blockwright.training.cadence import logs_now
from blockwright.training.callbacks.step_end import StepEnd
from blockwright.training.figure import Figure
from blockwright.training.tasks.base import Task


@enforced("callbacks.experts")
class DeadExperts(StepEnd):
    """Warns of experts whose load stays below a fraction of the fair share, and of routers with half of them so.

    Checks the loads each time they are logged, over all tokens since the last time. Logs
    ``train_load/dead_experts``, their number over all layers, while there are any.

    Args:
        below: fraction of the fair share 1/E below which an expert counts as idle
        steps: optimizer steps after which an idle expert counts as dead
    """

    figures = (Figure("dead_experts", "experts", "less", ("train_load",)),)

    def __init__(self, below: ProperFraction = 0.01, steps: Count = 200) -> None:
        self.below, self.steps = below, steps
        self._idle: dict[str, list[int]] = {}  # layer → idle steps of each expert
        self._last: int | None = None  # optimizer steps done when last looked at
        self._warned: dict[str, list[int]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = trainer.global_step if self._last is None else self._last

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        if not logs_now(trainer) or not isinstance(pl_module, Task) or self._last is None:
            return
        passed, self._last = step - self._last, step
        dead, warned = 0, any(self._warned.values())
        for layer, shares in pl_module.expert_shares.items():
            dead += self.look(layer, shares, passed, step)
        if dead or warned:  # log 0 once, when none is left
            pl_module.log("train_load/dead_experts", float(dead))

    def look(self, layer: str, shares: Tensor, passed: int, step: int) -> int:
        """Update the idle counts of one layer.

        Args:
            layer: its index
            shares: each expert's share of all choices since last time, [E]
            passed: optimizer steps since last time
            step: current step

        Returns:
            the number of dead experts
        """
        idle = (shares < self.below / len(shares)).tolist() if shares.sum() > 0 else [False] * len(shares)
        before = self._idle.get(layer, [0] * len(idle))
        self._idle[layer] = [steps + passed if now else 0 for steps, now in zip(before, idle, strict=True)]
        dead = [expert for expert, steps in enumerate(self._idle[layer]) if steps >= self.steps]
        if new := sorted(set(dead) - set(self._warned.get(layer, []))):
            fate = "its router has collapsed" if 2 * len(dead) >= len(idle) else "dead experts"
            rank_zero_warn(
                f"step {step}, layer {layer}: {fate}: {len(dead)} of {len(idle)} experts have had less than "
                f"{self.below:.0%} of their fair share for {self.steps} steps (new: {', '.join(map(str, new))})"
            )
        self._warned[layer] = dead
        return len(dead)

    def state_dict(self) -> dict[str, Any]:
        return {"idle": self._idle, "told": self._warned, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._idle, self._warned = dict(state_dict["idle"]), dict(state_dict["told"])
        self._last = state_dict["last"]
