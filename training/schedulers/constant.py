"""Warm-up, then the peak to the end."""

from __future__ import annotations

from blockwright.registry.readable import readable
from blockwright.training.schedulers.base import Schedule, Span


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
