"""Warm-up, then a staircase."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from registry.errors import ConfigError
from training.schedulers.base import Schedule, ratio, steps_of


class WarmupStepDecay(Schedule):
    """DeepSeek's multi-step schedule (DeepSeek LLM, 2024, arXiv:2401.02954; V2, arXiv:2405.04434).

    The factor is `gamma` to the power of the milestones passed: the step ⌊m · N⌉ is the first with the lower rate.

    Args:
        warmup: optimizer steps (1: none), or a fraction of the training in (0, 1)
        milestones: fractions of the training in (0, 1), rising. DeepSeek-V2 has 0.6 and 0.9; DeepSeekMoE-16B, V2-Lite
            and the 7B and 67B models 0.8 and 0.9
        gamma: what each milestone multiplies the learning rate by; 0.316 is about √0.1, so two make a tenth

    How this differs from the papers: theirs count tokens, this counts steps; the same where the batch is constant
    (V2 ramps it up over the first 225B of 8.1T tokens). Torch's MultiStepLR takes steps and has no warm-up.
    """

    def __init__(
        self, warmup: int | float = 2000, milestones: Sequence[float] = (0.6, 0.9), gamma: float = 0.316
    ) -> None:
        super().__init__(warmup)
        self.milestones = _rising_fractions(milestones)
        self.gamma = ratio("gamma", gamma)

    def after_warmup(self, step: int, max_steps: int) -> float:
        passed = sum(step >= steps_of(milestone, max_steps) for milestone in self.milestones)
        return self.gamma**passed

    def check_after_warmup(self, max_steps: int) -> None:
        warmup = self.warmup_steps(max_steps)
        # A fraction of a step is rounding, as in a dry run of one step; a whole step is a mistake.
        if self.milestones and self.milestones[0] * max_steps <= warmup - 1:
            raise ConfigError(
                "scheduler.milestones",
                list(self.milestones),
                f"the first comes before the end of the warm-up, step {warmup} of {max_steps}",
                "Raise the first milestone or shorten scheduler.warmup",
            )


def _rising_fractions(milestones: Any) -> tuple[float, ...]:
    values = tuple(milestones) if hasattr(milestones, "__iter__") else (milestones,)
    in_range = all(isinstance(value, float) and 0 < value < 1 for value in values)
    if not in_range or any(later <= earlier for earlier, later in pairwise(values)):
        raise ConfigError(
            "scheduler.milestones",
            milestones,
            "must be rising fractions of the training between 0 and 1",
            "Write for example scheduler.milestones=[0.6,0.9]",
        )
    return values
