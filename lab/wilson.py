"""Wilson's 95 % interval of a share, which is not empty even where all draws are right, or all wrong."""

from __future__ import annotations

import math

Z = 1.959964  # of a 95 % interval


def wilson(share: float, n: int) -> tuple[float, float]:
    """The centre and half the width of Wilson's interval, which lies within 0 and 1.

    Wilson 1927, doi 10.1080/01621459.1927.10502953. The share need not be a whole number of n, as SciPy's
    ``binomtest`` requires: a mean of values between 0 and 1 varies no more than draws of 0 or 1, so that the interval
    is as wide as need be, or wider.

    Args:
        share: mean of the draws
        n: number of draws
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    return centre, Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
