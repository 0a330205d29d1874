"""Warm-up, a plateau, and a decay at the end (WSD)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.ranges import Fraction
from blockwright.registry.readable import readable
from blockwright.training.schedulers.base import Schedule, Span, steps_of

SHAPES: dict[str, Callable[[float], float]] = {  # from 1 at t = 0 to 0 at t = 1
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "sqrt": lambda t: 1 - math.sqrt(t),
}


@readable
class WarmupStableDecay(Schedule):
    """WSD of MiniCPM (Hu et al., 2024, arXiv:2404.06395), decay shapes of Hägele et al. (2024, arXiv:2405.18392).

    With d steps of decay, N steps in all and r = `min_ratio`, the factor is 1 up to step N − d − 1, then::

        factor = r + (1 − r) · shape(t),    t = (step + 1 − (N − d)) / d

    so that the last step, N − 1, has exactly r. The plateau does not depend on N: its checkpoints can be continued,
    or decayed at several lengths.

    Args:
        warmup: optimizer steps (1: none), or a fraction of the training in (0, 1)
        decay: length of the decay at the end, in steps, or as a fraction of the training in (0, 1)
        min_ratio: learning rate of the last step, as a fraction of the peak
        shape: `sqrt`, 1 − √t, the best of Hägele et al.; `linear`, 1 − t; `cosine`, (1 + cos π t) / 2

    How this differs from the papers: MiniCPM decays exponentially over the last tenth. DeepSeek-V3's schedule is
    this one, cosine to 0.1, followed by two constant ends that are left out here.
    """

    def __init__(
        self,
        warmup: Span = 0.02,
        decay: Span = 0.2,
        min_ratio: Fraction = 0.0,
        shape: Literal["sqrt", "linear", "cosine"] = "sqrt",
    ) -> None:
        super().__init__(warmup)
        self.decay = decay
        self.min_ratio = float(min_ratio)
        if shape not in SHAPES:
            raise ConfigError("scheduler.shape", shape, "must be a known shape of decay", did_you_mean(shape, SHAPES))
        self.shape = shape

    def decay_steps(self, max_steps: int) -> int:
        """Steps of decay; if rounding would let it begin within the warm-up, the rest after the warm-up."""
        return min(steps_of(self.decay, max_steps), max_steps - self.warmup_steps(max_steps))

    def after_warmup(self, step: int, max_steps: int) -> float:
        decay = self.decay_steps(max_steps)
        into = step + 1 - (max_steps - decay)
        if into <= 0:
            return 1.0
        return self.min_ratio + (1 - self.min_ratio) * SHAPES[self.shape](into / decay)

    def check_after_warmup(self, max_steps: int) -> None:
        lengths = [part if isinstance(part, int) else part * max_steps for part in (self.warmup, self.decay)]
        # A fraction may be lost to rounding (a dry run of one step is all warm-up); a whole step is a mistake.
        if sum(lengths) >= max_steps + 1:
            raise ConfigError(
                "scheduler.decay",
                self.decay,
                f"with a warm-up of {self.warmup} it is longer than the training of {max_steps} steps",
                "Shorten scheduler.decay or scheduler.warmup; both may be fractions, such as 0.2 and 0.02",
            )
