"""Equivalence: whether two arms are the same within a margin, which "no difference was seen" does not show.

Two one-sided tests (Schuirmann 1987, doi 10.1007/BF01068419): the difference is above −δ and below +δ, each at
``level``; that is, its interval at confidence 1 − 2 · level is within ±δ.
"""

from __future__ import annotations

import math

from blockwright.lab.statistics.power import estimates

LEVEL = 0.05  # of each of the two tests


def same_within(mean: float, se: float, dof: float, margin: float, level: float = LEVEL) -> bool:
    """Whether the true difference is shown to be within ± ``margin``.

    Args:
        mean: difference that was seen
        se: its standard error
        dof: degrees of freedom of ``se``
        margin: δ, in the unit of ``mean``
        level: of each one-sided test
    """
    from scipy.special import stdtrit

    return abs(mean) + float(stdtrit(dof, 1 - level)) * se < margin


def margin_seen(
    sd: float, n: int, power: float = 0.8, dof: float | None = None, level: float = LEVEL, floor: float = 0.0
) -> float:
    """The smallest margin within which this share of sweeps shows two arms to be the same that are exactly the same.

        P = E[max(0, 2 Φ(δ √n / σ − t c) − 1)],    c = s / σ the root of χ²(dof) / dof

    Args:
        sd: σ, of a paired difference
        n: seeds
        power: share of sweeps
        dof: degrees of freedom of the estimate of ``sd``; None: n − 1
        level: of each one-sided test
        floor: standard error that seeds do not lessen; ``dof`` is then of the whole error
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import ndtr, stdtrit

    dof = n - 1 if dof is None else dof
    if dof <= 0:
        return math.inf
    wide = float(stdtrit(dof, 1 - level)) * estimates(dof)  # half the interval, in units of σ/√n

    def excess(margin: float) -> float:
        return float(np.maximum(2 * ndtr(margin - wide) - 1, 0).mean()) - power

    return math.hypot(sd / math.sqrt(n), floor) * float(brentq(excess, 0, float(wide.max()) + 10))
