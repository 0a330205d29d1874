"""Speed-up: how many times fewer tokens an arm needs for the loss of another."""

from __future__ import annotations

import math
from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]  # (tokens, loss), tokens rising


def first_reached(curve: Curve, target: float) -> float | None:
    """Tokens at which the loss first reaches ``target``, interpolated linearly.

    None if it never does, or had done so by the first measurement, some unknown number of tokens earlier.
    """
    before: tuple[float, float] | None = None
    for tokens, loss in curve:
        if loss <= target:
            if before is None:
                return None
            part = (before[1] - target) / (before[1] - loss)
            return before[0] + part * (tokens - before[0])
        if math.isfinite(loss):
            before = (tokens, loss)
    return None


def speed_up(arm: Curve, baseline: Curve) -> float | None:
    """Ratio of the tokens that the baseline and the arm need: 2 if the arm needs half as many.

    Measured at the higher of the two final losses, so that nothing is extrapolated. None without a curve, or if one of
    them is below that loss from its first measurement on, as a curve of one measurement always is.
    """
    if not arm or not baseline or not math.isfinite(arm[-1][1] + baseline[-1][1]):
        return None
    target = max(arm[-1][1], baseline[-1][1])
    ours, theirs = first_reached(arm, target), first_reached(baseline, target)
    return theirs / ours if ours and theirs else None
