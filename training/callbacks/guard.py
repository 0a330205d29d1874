"""Skip optimizer steps with a non-finite or outlying loss or gradient, so that a bad batch does not end the run."""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count, Positive
from blockwright.training.cadence import logs_now
from blockwright.training.callbacks.step_end import StepEnd
from blockwright.training.figure import TRAIN, Figure
from blockwright.training.parallel.collectives import total_norm
from blockwright.training.result import Diverged

QUANTITIES = ("loss", "gradient norm")
LEAST_SPREAD = 1e-3  # relative to the mean; a loss with less spread has no outliers


def _overflows(values: dict[str, float]) -> bool:
    """Whether only the gradient is not finite, as when a scaled one overflows fp16."""
    return math.isfinite(values["loss"]) and not math.isfinite(values["gradient norm"])


@enforced("callbacks.guard")
class Guard(StepEnd):
    """Skips an optimizer step on all ranks when its loss or gradient norm is bad, and stops the run if this persists.

    Bad is a value that is not finite, or, once ``window`` steps have been seen, above their mean by more than
    ``sigmas`` standard deviations, the rule of the optimizers of OLMo-core (Groeneveld et al., 2024).
    A skipped step changes nothing: no weight, no optimizer state, no balancing bias. It counts as a step, since
    batches and learning rates are functions of the step number.

    How this differs from OLMo's: the decision is made before the step, not inside the optimizer, so any optimizer
    works; a finite outlier enters the window, so that a new level is soon accepted.

    The loss is its mean over all micro-batches and ranks, and the norm that of the whole gradient, so all ranks see the
    same numbers. Reading them synchronises with the device once per step.

    Under fp16, overflowing gradients are left to the gradient scaler, which skips the step and lowers its scale;
    they count against ``patience`` once the scale is down to 1.

    Args:
        window: number of previous steps for comparison
        sigmas: standard deviations above their mean that count as bad; null checks finiteness only
        patience: consecutive skipped steps before training is stopped
    """

    figures = (Figure("skipped_steps", "steps", None, TRAIN),)

    def __init__(
        self, window: Annotated[int, Ge(2)] = 128, sigmas: Positive | None = 6.0, patience: Count = 10
    ) -> None:
        self.window, self.sigmas, self.patience = window, sigmas, patience
        self._seen = {name: deque[float](maxlen=window) for name in QUANTITIES}
        self._loss: Tensor | float = 0.0  # sum over the step's micro-batches so far
        self.skipped = self.in_a_row = 0
        self._judged: tuple[dict[str, float], bool] | None = None  # values of the step, whether it is skipped

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._loss = self._loss + loss.detach().float() / (scaler.get_scale() if scaler else 1)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        # Before clipping, and after the gradients have been averaged over ranks and micro-batches.
        loss, self._loss, self._judged = self._loss, 0.0, None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        norm = total_norm(pl_module.parameters())
        both = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=pl_module.device) for v in (loss, norm)])
        if trainer.world_size > 1:
            both = trainer.strategy.reduce(both, reduce_op="mean")
        values = dict(zip(QUANTITIES, both.tolist(), strict=True))
        if scaler and scaler.get_scale() > 1 and _overflows(values):
            return
        reason = self.judge(values)
        self._judged = values, reason is not None
        if reason:
            for parameter in pl_module.parameters():
                parameter.grad = None  # optimizers skip parameters without one
            rank_zero_warn(f"step {trainer.global_step} is skipped: {reason}")
            if self.in_a_row + 1 >= self.patience:
                raise Diverged(trainer.global_step, f"{reason}, as in each of the last {self.in_a_row + 1} steps")

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        if self._judged is not None:
            self.record(*self._judged)

    def judge(self, values: dict[str, float]) -> str | None:
        """What is wrong with the values of a step, or None."""
        return next(filter(None, [self._fault(name, value) for name, value in values.items()]), None)

    def record(self, values: dict[str, float], skipped: bool) -> None:
        """Take the values of a step, if they are finite, into the window, and count it if it was skipped."""
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if all(map(math.isfinite, values.values())):
            for name, value in values.items():
                self._seen[name].append(value)

    def _fault(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"its {name} is {value}"
        seen = self._seen[name]
        if self.sigmas is None or len(seen) < self.window:
            return None
        mean = sum(seen) / len(seen)
        spread = max((sum((v - mean) ** 2 for v in seen) / len(seen)) ** 0.5, LEAST_SPREAD * abs(mean))
        if value <= mean + self.sigmas * spread:
            return None
        return f"its {name} {value:.4g} is {(value - mean) / spread:.3g} sigma above the last {self.window}, {mean:.4g}"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.skipped and logs_now(trainer):
            pl_module.log("train/skipped_steps", float(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        seen = {name: list(values) for name, values in self._seen.items()}
        return {"seen": seen, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        for name, values in state_dict["seen"].items():
            self._seen[name] = deque(values, maxlen=self.window)
