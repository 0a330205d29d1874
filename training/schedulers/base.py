"""The interface of schedules: a factor on the peak learning rate for every optimizer step, a pure function of the step.

Importing one imports neither torch nor Lightning. The task wraps it, once the length of the training is known::

    schedule.check(max_steps)
    LambdaLR(optimizer, lambda step: schedule.factor(step, max_steps))

Not supported: schedules of the batch size, and schedules that depend on a metric (Lightning takes torch's for that).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count, ProperFraction

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
