"""Tuning of a knob of each arm, such as its learning rate, from a few tries of one seed.

In octaves, x = log₂ value, the loss near the best value x* is L* + c (x − x*)². The best of a grid is up to half a
spacing from x*, which makes a false difference of two arms out of c; the vertex of a fitted curve is not. Curves are
lopsided (too large a rate costs more than too small a one), so that six tries or more are fitted by a cubic.

The rounds: five tries an octave apart; while an arm asks for more (``next_tries``), two more for every arm
(``further``), so that all are tuned alike; then fresh seeds at each arm's vertex, since a seed that chose a value
flatters it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blockwright.lab.statistics.variance import Left

COARSE = 0.75  # zoom where half a spacing costs more than this many standard deviations of a run
FINEST = 0.25  # octaves between two tries; closer ones show noise alone
WINDOW = 6.0  # spacings beside the best try, within which the curve is fitted: wider is biased, narrower noisy
WIDEST = 2.5  # octaves, of that window

Edge = Literal["low", "high"]
ENDS: dict[Edge, str] = {"low": "smallest", "high": "largest"}  # of the tries, in words


@dataclass(frozen=True)
class Try:
    """A value that was tried.

    Args:
        value: of the knob; positive
        loss: final, less is better; not finite if the run diverged, which counts as worse than all others
    """

    value: float
    loss: float

    @property
    def octave(self) -> float:
        return math.log2(self.value)

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)


@dataclass(frozen=True)
class Fit:
    """The best value of a knob, from tries.

    Args:
        vertex: best value, in the unit of the knob; within the tries that did not diverge
        curvature: c at the vertex, in nats per octave²; infinite where fewer than three tries show it
        regret: expected excess loss at the vertex over the best value, in nats; infinite where fewer than three tries
            show it
        edge: the end of the tries at which the best try is, so that a better value may lie beyond; else None
        shake: Var(x̂) over the variance of a run, by the delta method; infinite where the curve is not convex
        spread: of the losses that the curve is through, in nats
        dof: tries less parameters of the curve
    """

    vertex: float
    curvature: float
    regret: float
    edge: Edge | None
    shake: float = math.inf
    spread: float = math.inf
    dof: int = 0

    def left(self, sd_of_run: float) -> Left:
        """The variance that tuning leaves in the loss of an arm at its vertex: fresh seeds do not lessen it.

        The excess loss c (x̂ − x*)² has mean R, ``regret``, of which noise makes S = c Var(x̂) and a curve of another
        shape makes the rest. So it is c times a noncentral χ² of one degree of freedom, whose variance is

            Var = 2 S (2 R − S)

        and at most that of a rectangle as wide as the spread of the tries, spread² / 12.

        Args:
            sd_of_run: σ of the tries; the standard deviation of a paired difference / √2
        """
        widest = self.spread * self.spread / 12  # infinite, where a power would raise
        if not math.isfinite(widest):
            return Left()
        if not math.isfinite(self.shake):
            return Left(widest, max(self.dof, 1))
        of_noise = min(self.curvature * self.shake * sd_of_run * sd_of_run, self.spread)
        regret = max(self.regret, of_noise) if self.dof else of_noise
        return Left(min(2 * of_noise * (2 * regret - of_noise), widest), max(self.dof, 1))


def fit(tries: Sequence[Try]) -> Fit:
    """Fit a parabola, or a cubic to six tries or more, to the tries near the best.

    Args:
        tries: at least one, of different values
    """
    near = _near(tries)
    if len(near) < 3:
        return Fit(_best(tries).value, math.inf, math.inf, _edge(tries))
    curve = _Curve(near)
    rest = _edge(tries), curve.shake, _spread(near), len(near) - curve.degree - 1
    return Fit(2**curve.vertex, curve.curvature, _regret(near, curve), *rest)


def _spread(near: Sequence[Try]) -> float:
    losses = [each.loss for each in near]
    return max(losses) - min(losses)


def _regret(near: Sequence[Try], curve: _Curve) -> float:
    """c Var(x̂), by the jackknife: (n − 1)/n Σ (x̂ᵢ − x̄)² over the fits that leave out one try each.

    So it holds the noise of the tries and what the polynomial misses of the curve. At most the spread of the tries,
    which is also the answer where the curve is not convex, or where no try can be left out.
    """
    spread = _spread(near)
    if curve.curvature == 0 or len(near) < 4:
        return spread
    others = [_Curve([*near[:i], *near[i + 1 :]], curve.degree).vertex for i in range(len(near))]
    middle = math.fsum(others) / len(others)
    variance = (1 - 1 / len(others)) * math.fsum((at - middle) ** 2 for at in others)
    return min(curve.curvature * variance, spread)


def _near(tries: Sequence[Try]) -> list[Try]:
    """The five nearest to the best, and all within the window, that did not diverge."""
    best = _best(tries)
    ordered = sorted((t for t in tries if not t.diverged), key=lambda each: abs(each.octave - best.octave))
    width = min(WIDEST, WINDOW * _spacing(tries)) + 1e-9  # so that rounding leaves out no end
    return [each for i, each in enumerate(ordered) if i < 5 or abs(each.octave - best.octave) <= width]


def next_tries(tries: Sequence[Try], sd_of_run: float) -> list[float]:
    """Two further values if this arm needs them, else none: then it is tuned.

    An arm needs them if its best try is at an edge, if a value beside the best diverged, or if half a spacing beside it
    costs more than noise: c/4 · spacing² > 0.75 σ. Equal arms whose curves are as lopsided as measured are then called
    different by 8 fresh seeds in 5.5 to 6.1 % of sweeps, at c from .01 to .2 and σ = .005; by 16 fresh seeds, whose
    interval is narrower than what tuning leaves, in 6 to 7.5 %; and if one arm's curve is a parabola, in up to 6.6 %
    and 8.7 %.

    Bound the rounds: an arm whose loss falls towards ever smaller or larger values asks for ever.

    Args:
        tries: as of ``fit``
        sd_of_run: σ; the standard deviation of a paired difference / √2. Half or twice the true one calls up to 6.9 %
            of equal arms different: too small, and more tries add noise; too large, and none are added.
    """
    return further(tries) if _edge(tries) or _is_coarse(tries, sd_of_run) else []


def further(tries: Sequence[Try]) -> list[float]:
    """The two values to try next, ascending, for an arm that shares the round of one that needs it.

    Beyond the edge by one and by two octaves if the best try is at an edge; else half-way to the values beside it.
    """
    best, edge = _best(tries), _edge(tries)
    if edge == "low":
        return [best.value / 4, best.value / 2]
    if edge == "high":
        return [best.value * 2, best.value * 4]
    return [math.sqrt(best.value * each.value) for each in _beside(tries)]


def _is_coarse(tries: Sequence[Try], sd_of_run: float) -> bool:
    spacing = _spacing(tries)
    if spacing <= FINEST:
        return False
    near = _near(tries)
    if len(near) < 3 or any(each.diverged for each in _beside(tries)):
        return True
    return _Curve(near).curvature / 4 * spacing**2 > COARSE * sd_of_run


def _best(tries: Sequence[Try]) -> Try:
    """The smallest loss; of tries that all diverged, the smallest value."""
    return min(tries, key=lambda each: (math.inf if each.diverged else each.loss, each.value))


def _edge(tries: Sequence[Try]) -> Edge | None:
    best, values = _best(tries).value, [each.value for each in tries]
    return "low" if best == min(values) else "high" if best == max(values) else None


def _beside(tries: Sequence[Try]) -> list[Try]:
    """The tries next to the best one; one at an edge."""
    ordered = sorted(tries, key=lambda each: each.value)
    at = ordered.index(_best(tries))
    return ordered[max(at - 1, 0) : at] + ordered[at + 1 : at + 2]


def _spacing(tries: Sequence[Try]) -> float:
    """Octaves from the best to the farther of those beside it; 0 for a single try."""
    best = _best(tries)
    return max((abs(each.octave - best.octave) for each in _beside(tries)), default=0.0)


class _Curve:
    """A polynomial p of x in octaves, by least squares, and where it is least within its tries.

    Args:
        tries: none of them diverged; more than ``degree``
        degree: 2 or 3; None: 3 for six tries or more
    """

    def __init__(self, tries: Sequence[Try], degree: int | None = None) -> None:
        import numpy as np

        self.degree = degree or (2 if len(tries) < 6 else 3)
        xs = [each.octave for each in tries]
        self.middle = math.fsum(xs) / len(xs)
        design = self._design = np.vander([x - self.middle for x in xs], self.degree + 1)
        weights = np.linalg.lstsq(design, np.array([each.loss for each in tries]), rcond=None)[0]
        self.cubic, self.square, self.slope, _ = (0.0,) * (3 - self.degree) + tuple(float(w) for w in weights)
        low, high = min(xs) - self.middle, max(xs) - self.middle
        self.least = min((low, high, *(x for x in self._turns() if low <= x <= high)), key=self._height)

    def _height(self, x: float) -> float:
        """p(x) − p(0), with x from the middle of the tries."""
        return ((self.cubic * x + self.square) * x + self.slope) * x

    def _turns(self) -> list[float]:
        """Where p′ = 3 a x² + 2 b x + c is 0."""
        a, b, c = 3 * self.cubic, 2 * self.square, self.slope
        if a == 0:
            return [-c / b] if b else []
        root = b * b - 4 * a * c
        if root < 0:
            return []
        half = -(b + math.copysign(math.sqrt(root), b)) / 2  # of two alike terms, so that no digits cancel
        return [half / a, *([c / half] if half else [])]

    @property
    def vertex(self) -> float:
        return self.middle + self.least

    @property
    def shake(self) -> float:
        """Var(x̂) over the variance of a try: x̂ is where p′ = 0, so that dx̂/dw_j = −j x̂^(j−1) / p″."""
        import numpy as np

        if not self.curvature:
            return math.inf
        powers = np.arange(self.degree, -1, -1)
        slope = powers * float(self.least) ** np.maximum(powers - 1, 0) / (2 * self.curvature)
        return float(np.sum((slope @ np.linalg.pinv(self._design)) ** 2))

    @property
    def curvature(self) -> float:
        """p″ / 2 at the vertex; 0 where that is not convex."""
        return max(3 * self.cubic * self.least + self.square, 0.0)
