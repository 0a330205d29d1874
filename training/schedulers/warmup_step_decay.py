"""Warm-up, then a staircase."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Fraction, ProperFraction
from blockwright.registry.readable import readable
from blockwright.training.schedulers.base import Schedule, Span, steps_of


@readable
class WarmupStepDecay(Schedule):
    """DeepSeek's multi-step schedule (DeepSeek LLM, 2024, arXiv:2401.02954; V2, arXiv:2405.04434).

    The factor is `gamma` to the power of the milestones passed: step ⌊m · N⌉ is the first with the lower rate.

    Args:
        warmup: optimizer steps (1: none), or a fraction of the training in (0, 1)
        milestones: fractions of the training in (0, 1), rising. DeepSeek-V2 has 0.6 and 0.9; DeepSeekMoE-16B, V2-Lite
            and the 7B and 67B models 0.8 and 0.9
        gamma: factor on the learning rate at each milestone; 0.316 is about √0.1, so two make a tenth

    How this differs from the papers: theirs count tokens, this counts steps; the same for a constant batch size
    (V2 ramps it up over the first 225B of 8.1T tokens). Torch's MultiStepLR takes steps and has no warm-up.
    """

    def __init__(
        self, warmup: Span = 2000, milestones: Sequence[ProperFraction] = (0.6, 0.9), gamma: Fraction = 0.316
    ) -> None:
        super().__init__(warmup)
        self.milestones = _rising(milestones)
        self.gamma = float(gamma)

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


def _rising(milestones: Sequence[float]) -> tuple[float, ...]:
    if any(later <= earlier for earlier, later in pairwise(milestones)):
        raise ConfigError(
            "scheduler.milestones", milestones, "must rise", "Write for example scheduler.milestones=[0.6,0.9]"
        )
    return tuple(milestones)
