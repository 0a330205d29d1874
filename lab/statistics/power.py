"""Power: the smallest difference that a sweep sees, and the seeds to see a given one.

"Seen" is a two-sided t-test at ``level``. Among several comparisons, Holm's correction tests the smallest p at
level / comparisons: its worst step, which is used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MOST = 100_000  # seeds
STEPS = 4000  # of the integral over the estimated noise


def chance(
    difference: float,
    sd: float,
    n: int,
    dof: float | None = None,
    comparisons: int = 1,
    level: float = 0.05,
    floor: float = 0.0,
) -> float:
    """Share of sweeps that see this difference.

        P = E[Φ(δ √n / σ − t c) + Φ(−δ √n / σ − t c)],    c = s / σ the root of χ²(dof) / dof

    This is the noncentral t distribution, whose functions in SciPy are NaN for some arguments.

    Args:
        difference: δ, the true one, in the unit of ``sd``
        sd: σ, of a paired difference
        n: seeds
        dof: degrees of freedom of the estimate of ``sd``; None: n − 1, of the paired t-test
        comparisons: of the sweep, for Holm's correction
        level: of the test, two-sided
        floor: standard error that seeds do not lessen, in the unit of ``sd``; ``dof`` is then of the whole error
    """
    import numpy as np
    from scipy.special import ndtr, stdtrit

    dof = n - 1 if dof is None else dof
    critical = float(stdtrit(dof, 1 - level / comparisons / 2)) * estimates(dof)
    shift = abs(difference) / math.hypot(sd / math.sqrt(n), floor)
    return float(np.mean(ndtr(shift - critical) + ndtr(-shift - critical)))


def estimates(dof: float) -> np.ndarray[Any, Any]:
    """s / σ of an estimated standard deviation, at evenly spaced probabilities; of ``dof`` to two digits."""
    return _estimates(float(f"{dof:.2g}"))


@cache
def _estimates(dof: float) -> np.ndarray[Any, Any]:
    import numpy as np
    from scipy.stats import chi2

    ratios = np.sqrt(chi2.ppf((np.arange(STEPS) + 0.5) / STEPS, dof) / dof)
    ratios.setflags(write=False)
    return ratios


def detectable(
    sd: float,
    n: int,
    dof: float | None = None,
    comparisons: int = 1,
    power: float = 0.8,
    level: float = 0.05,
    floor: float = 0.0,
) -> float:
    """The smallest difference that this share of sweeps sees; arguments as of ``chance``.

    Infinite for one seed without degrees of freedom.
    """
    from scipy.optimize import brentq

    if (n - 1 if dof is None else dof) <= 0:
        return math.inf
    floor, most = floor / sd, 1.0
    while chance(most, 1.0, n, dof, comparisons, level, floor) < power:
        most *= 2
    return sd * float(brentq(lambda d: chance(d, 1.0, n, dof, comparisons, level, floor) - power, 0, most))


def own_dof(n: int) -> float:
    """Degrees of freedom of the variance of n paired differences."""
    return n - 1


def seeds_to_see(
    difference: float,
    sd: float,
    dof: Callable[[int], float] = own_dof,
    comparisons: int = 1,
    power: float = 0.8,
    level: float = 0.05,
    floor: float = 0.0,
) -> int:
    """The fewest seeds with which this share of sweeps sees the difference; arguments as of ``chance``.

    Args:
        dof: degrees of freedom as a function of the seeds; pooled over A arms: lambda n: (A − 1)(n − 1); with a bank
            of d₀: lambda n: n − 1 + d₀

    Raises:
        ValueError: if more than 100,000 seeds would be needed, as for a difference of 0
    """

    def sees(n: int) -> bool:
        return dof(n) > 0 and chance(difference, sd, n, dof(n), comparisons, level, floor) >= power

    enough = 1
    while not sees(enough):
        if enough > MOST:
            raise ValueError(f"a difference of {difference:g} at a noise of {sd:g} needs more than {MOST:,} seeds")
        enough *= 2
    few = enough // 2
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if sees(middle) else (middle, enough)
    return enough


# --- equivalence ------------------------------------------------------------------------------------------------------


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
