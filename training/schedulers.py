"""The interface of schedules: a factor on the peak learning rate for every optimizer step, a pure function of the step.

Importing one imports neither torch nor Lightning. The task wraps it, once the length of the training is known::

    schedule.check(max_steps)
    LambdaLR(optimizer, lambda step: schedule.factor(step, max_steps))

Not supported: schedules of the batch size, and schedules that depend on a metric (Lightning takes torch's for that).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.index import readable
from blockwright.registry.ranges import Count, Fraction, ProperFraction

Span = Count | ProperFraction  # optimizer steps, or a part of the training


class Schedule(ABC):
    """Linear warm-up, then the factor of the subclass.

    Steps are counted from 0 to `max_steps` − 1. With w steps of warm-up the factor is (step + 1) / w: the first step
    already learns, step w − 1 has the peak.

    Args:
        warmup: length of the warm-up: a number of optimizer steps (1: none), or a fraction of `max_steps` in (0, 1)

    A number outside its annotated range is refused with a ConfigError (registry/ranges.py).
    """

    needs_end: ClassVar[bool] = True  # whether the factor after the warm-up depends on max_steps

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        enforced("scheduler")(cls)

    def __init__(self, warmup: Span) -> None:
        self.warmup = warmup

    def factor(self, step: int, max_steps: int) -> float:
        """The factor on the peak learning rate at optimizer step `step`; after the end that of the last step."""
        warmup = self.warmup_steps(max_steps)
        step = min(step, max_steps - 1) if max_steps > 0 else step
        return (step + 1) / warmup if step < warmup else self.after_warmup(step, max_steps)

    def check(self, max_steps: int) -> None:
        """Refuse a training of `max_steps` optimizer steps that the schedule does not fit."""
        if (self.needs_end or isinstance(self.warmup, float)) and not 0 < max_steps < math.inf:
            raise ConfigError(
                "trainer.max_steps",
                max_steps,
                f"{type(self).__name__} needs the length of the training",
                "Write trainer.max_steps=NUMBER, or scheduler=constant with scheduler.warmup in steps",
            )
        if 0 < max_steps < self.warmup_steps(max_steps):
            raise ConfigError(
                "scheduler.warmup",
                self.warmup,
                f"warm-up is longer than the training of {max_steps} steps",
                f"Write at most {max_steps}, or a fraction such as scheduler.warmup=0.02",
            )
        self.check_after_warmup(max_steps)

    def warmup_steps(self, max_steps: int) -> int:
        """Steps of warm-up in a training of `max_steps`: at least one, which means none."""
        return max(1, steps_of(self.warmup, max_steps))

    @abstractmethod
    def after_warmup(self, step: int, max_steps: int) -> float:
        """The factor at a step in [`warmup_steps`, `max_steps`)."""

    @abstractmethod
    def check_after_warmup(self, max_steps: int) -> None:
        """The subclass's part of `check`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def steps_of(length: int | float, max_steps: int) -> int:
    """A length in steps: unchanged, or the rounded fraction of `max_steps`."""
    return length if isinstance(length, int) else round(length * max_steps)


# Warm-up, then the peak to the end.


@readable
class Constant(Schedule):
    """The peak learning rate after the warm-up: factor 1.

    Used by DeepSeekMoE-145B. The only schedule that does not depend on the end of training; the stable phase of
    `WarmupStableDecay`, from which a decay can be branched off later.

    Args:
        warmup: optimizer steps (1: none), or a fraction of the training in (0, 1)
    """

    needs_end = False

    def __init__(self, warmup: Span = 0.02) -> None:
        super().__init__(warmup)

    def after_warmup(self, step: int, max_steps: int) -> float:
        return 1.0

    def check_after_warmup(self, max_steps: int) -> None:
        """Nothing to check."""


# Warm-up, then half a cosine down to the end.


@readable
class WarmupCosine(Schedule):
    """Cosine decay without restarts (Loshchilov & Hutter, 2017, arXiv:1608.03983), after a linear warm-up.

    With w steps of warm-up, N steps in all and r = `min_ratio`::

        factor = r + (1 − r) · (1 + cos π t) / 2,    t = (step + 1 − w) / (N − w)

    so that the last step, N − 1, has exactly r.

    Args:
        warmup: optimizer steps (1: none), or a fraction of the training in (0, 1)
        min_ratio: learning rate of the last step, as a fraction of the peak

    How this differs from others: torch's CosineAnnealingLR gives r to step N, which is never taken. The whole curve
    depends on N: a run stopped early has not been annealed (`WarmupStableDecay` has).
    """

    def __init__(self, warmup: Span = 0.02, min_ratio: Fraction = 0.1) -> None:
        super().__init__(warmup)
        self.min_ratio = float(min_ratio)

    def after_warmup(self, step: int, max_steps: int) -> float:
        warmup = self.warmup_steps(max_steps)
        t = (step + 1 - warmup) / (max_steps - warmup)
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * t)) / 2

    def check_after_warmup(self, max_steps: int) -> None:
        """Nothing to check: the warm-up fits."""


# Warm-up, a plateau, and a decay at the end (WSD).

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


# Warm-up, then a staircase.


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
        if any(later <= earlier for earlier, later in pairwise(milestones)):
            raise ConfigError(
                "scheduler.milestones", milestones, "must rise", "Write for example scheduler.milestones=[0.6,0.9]"
            )
        self.milestones = tuple(milestones)
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
