"""Warm-up, then half a cosine down to the end."""

from __future__ import annotations

import math

from blockwright.registry.ranges import Fraction
from blockwright.registry.readable import readable
from blockwright.training.schedulers.base import Schedule, Span


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
