"""Looks at a growing sweep: the nominal p of each, such that all looks together call noise a difference at ``level``.

Lan and DeMets 1983, doi 10.1093/biomet/70.3.659: a spending function α(t) of the share t of seeds seen so far says how
much of the level is spent by then. Looking at 4, 8, 12 and 16 seeds without spending has size .14 instead of .05.

The boundaries are of normal theory. Student's t with few seeds adds a tenth to the size, so that ``level`` is .045 for
a size of .05.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.045
NODES = 256  # of the integral over the sum of the values seen so far

Spend = Literal["obrien_fleming", "pocock"]


def _obrien_fleming(share: float, level: float) -> float:
    """2 (1 − Φ(z / √t)): nearly nothing early, so that the last look is nearly that of a fixed number of seeds."""
    from scipy.special import ndtr, ndtri

    return 2 * float(ndtr(ndtri(level / 2) / math.sqrt(share)))


def _pocock(share: float, level: float) -> float:
    """α ln(1 + (e − 1) t): about alike at every look, so that large differences stop early."""
    return level * math.log(1 + (math.e - 1) * share)


SPENDING: dict[str, Callable[[float, float], float]] = {"obrien_fleming": _obrien_fleming, "pocock": _pocock}


def nominal(seeds: Sequence[int], spend: Spend, level: float = LEVEL) -> tuple[float, ...]:
    """Two-sided p below which each look calls a difference.

    For equivalence by two one-sided tests at the looks, halve ``nominal(seeds, spend, 2 * level)``.

    Args:
        seeds: numbers of seeds at which it is looked, rising; the last is the most that are run
        spend: spending function
        level: of all looks together
    """
    spent = [SPENDING[spend](n / seeds[-1], level) for n in seeds]
    path = _Path(seeds[0])
    ps, before = [], 0.0
    for i, (n, total) in enumerate(zip(seeds, spent, strict=True)):
        if i:
            path.advance(n)
        ps.append(path.stop(total - before))
        before = total
    return tuple(ps)


class _Path:
    """The sum of n independent standard normal values, among paths that no look has stopped.

    Armitage, McPherson and Rowe 1969, doi 10.2307/2343787: the density at the nodes of a Gauss–Legendre rule between
    the boundaries of the look before, convolved with the normal density of what is added.
    """

    def __init__(self, n: int) -> None:
        self.n, self.added = n, math.sqrt(n)
        self.nodes: np.ndarray[Any, Any] | None = None  # None before the first look, where the sum starts at 0
        self.mass: Any = None

    def advance(self, n: int) -> None:
        self.added, self.n = math.sqrt(n - self.n), n

    def stop(self, share: float) -> float:
        """Stop this share of all paths, and return the nominal p at which they stop."""
        from scipy.optimize import brentq
        from scipy.special import ndtr

        root = math.sqrt(self.n)
        if share <= 0:  # too little to count with
            z = 40.0
        else:
            z = float(brentq(lambda z: math.log(max(self._beyond(z * root), 1e-300) / share), 0, 40))
        self._keep(z * root)
        return 2 * float(ndtr(-z))

    def _beyond(self, boundary: float) -> float:
        from scipy.special import ndtr

        if self.nodes is None:
            return 2 * float(ndtr(-boundary / self.added))
        up, down = (boundary - self.nodes) / self.added, (boundary + self.nodes) / self.added
        return float(self.mass @ (ndtr(-up) + ndtr(-down)))

    def _keep(self, boundary: float) -> None:
        """The density of paths between ± ``boundary``, at new nodes."""
        import numpy as np
        from scipy.stats import norm

        at, weights = np.polynomial.legendre.leggauss(NODES)
        limit = min(boundary, 9 * math.sqrt(self.n))
        nodes = at * limit
        if self.nodes is None:
            density = norm.pdf(nodes / self.added) / self.added
        else:
            density = norm.pdf((nodes[:, None] - self.nodes) / self.added) / self.added @ self.mass
        self.nodes, self.mass = nodes, density * weights * limit


# --- the excess of an estimate at which a growing sweep has stopped early ---------------------------------------------


DENSITY_NODES = 1201  # of the density of the sum
WIDTH = 8.0  # standard deviations of the last look, on either side


def overestimate(seeds: Sequence[int], spend: Spend, effect: float) -> float:
    """Mean of estimate − truth, in σ, among sweeps that find a difference before their last look.

    The density of the sum of n values of mean ``effect`` and variance 1, among sweeps that no look has stopped, is
    integrated from look to look; a sweep stops where |sum| > z √n, at the estimate sum / n. A sweep that stops early
    has been lucky, so the mean is above 0; the smaller the true difference, the more.

    Args:
        seeds: of the looks
        spend: spending function
        effect: true difference, in σ; the estimate stands in for it
    """
    return _overestimate(tuple(seeds), spend, round(abs(effect), 3))


@lru_cache
def _overestimate(seeds: tuple[int, ...], spend: Spend, effect: float) -> float:
    import numpy as np
    from scipy.stats import norm

    limit = WIDTH * math.sqrt(seeds[-1])
    nodes = np.linspace(-limit, effect * seeds[-1] + limit, DENSITY_NODES)
    step = nodes[1] - nodes[0]
    going, before, stopped, excess = None, 0, 0.0, 0.0
    for n, p in zip(seeds[:-1], nominal(seeds, spend)[:-1], strict=True):
        mean, sd = effect * (n - before), math.sqrt(n - before)
        if going is None:
            density = norm.pdf(nodes, mean, sd)
        else:
            density = norm.pdf(nodes[:, None] - nodes[None, :], mean, sd) @ going * step
        beyond = np.abs(nodes) > float(norm.isf(p / 2)) * math.sqrt(n)
        stopped += float(density[beyond].sum()) * step
        excess += float((density * (np.abs(nodes) / n - effect))[beyond].sum()) * step
        going, before = np.where(beyond, 0.0, density), n
    return excess / stopped if stopped > 0 else 0.0
