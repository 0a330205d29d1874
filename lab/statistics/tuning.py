"""Tuning of a knob of each arm, such as its learning rate, from a few tries of one seed or of several.

In octaves, x = log₂ value, the loss near the best value x* is L* + c (x − x*)². The best of a grid is up to half a
spacing from x*, which makes a false difference of two arms out of c; the vertex of a fitted curve is not. Curves are
lopsided (too large a rate costs more than too small a one), so that six tries or more are fitted by a cubic. A
polynomial misses more of the curve the higher a try is above the best, so that a try counts the less (``_Curve``).

The rounds: five tries an octave apart; while an arm asks for more (``next_tries``), two more for every arm
(``further``), so that all are tuned alike; then fresh seeds at each arm's vertex, since a seed that chose a value
flatters it. The designs of ablations, ladders and transfers share these rounds (``next_round``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from blockwright.lab.statistics.variance import Left
from blockwright.registry import ConfigError
from blockwright.training.result import Result

COARSE = 0.75  # zoom where half a spacing costs more than this many standard deviations of a run
FINEST = 0.25  # octaves between two tries; closer ones show noise alone
BEST = 5  # tries that place the vertex
STEEP = 2.0  # more leans on fewer tries, so that a vertex is less biased by the shape of the curve and noisier

Edge = Literal["low", "high"]
ENDS: dict[Edge, str] = {"low": "smallest", "high": "largest"}  # of the tries, in words


@dataclass(frozen=True)
class Try:
    """A value that was tried.

    Args:
        value: of the knob; positive
        loss: final, less is better; not finite if the run diverged, which counts as worse than all others
        seeds: whose mean the loss is; one of them that diverged makes it so
    """

    value: float
    loss: float
    seeds: int = 1

    @property
    def octave(self) -> float:
        return math.log2(self.value)

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)


def averaged(runs: Iterable[tuple[float, float]]) -> list[Try]:
    """The tries of several seeds each, ascending, from the value and the loss of each run."""
    losses: dict[float, list[float]] = {}
    for value, loss in sorted(runs):
        losses.setdefault(value, []).append(loss)
    return [Try(value, math.fsum(each) / len(each), len(each)) for value, each in losses.items()]


@dataclass(frozen=True)
class Fit:
    """The best value of a knob, from tries.

    Args:
        vertex: best value, in the unit of the knob; among the five best tries
        curvature: c at the vertex, in nats per octave²; infinite where fewer than three tries show it
        regret: expected excess loss at the vertex over the best value, in nats; infinite where fewer than three tries
            show it
        edge: the end of the tries at which the best try is, so that a better value may lie beyond; else None
        shake: Var(x̂) over the variance of a run, by the delta method; infinite where the curve is not convex
        spread: of the losses of the five best tries, in nats
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
            sd_of_run: σ of a run, not of the mean of several; the standard deviation of a paired difference / √2
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
    """Fit a parabola, or a cubic to six tries or more, that leans on the best of them (``_Curve``).

    Args:
        tries: at least one, of different values
    """
    good = [each for each in tries if not each.diverged]
    if len(good) < 3:
        return Fit(_best(tries).value, math.inf, math.inf, _edge(tries))
    curve = _Curve(good)
    rest = _edge(tries), curve.shake, curve.spread, len(good) - curve.degree - 1
    return Fit(2**curve.vertex, curve.curvature, _regret(good, curve), *rest)


def next_tries(tries: Sequence[Try], sd_of_run: float) -> list[float]:
    """Two further values if this arm needs them, else none: then it is tuned.

    An arm needs them if its best try is at an edge, if a value beside the best diverged, or if half a spacing beside it
    costs more than noise: c/4 · spacing² > 0.75 σ, with σ of a try. Equal arms whose curves are as lopsided as measured
    are then called different by 8 fresh seeds in 5.4 to 6.1 % of sweeps, at c from .01 to .2 and σ = .005; by 16 fresh
    seeds, whose interval is narrower than what tuning leaves, in 6 to 7.5 %; and if one arm's curve is a parabola, in
    up to 5.7 % and 6.7 %.

    Bound the rounds: an arm whose loss falls towards ever smaller or larger values asks for ever.

    Args:
        tries: as of ``fit``
        sd_of_run: of a run; the standard deviation of a paired difference / √2. Half or twice the true one calls up to
            6.8 % of equal arms different: too small, and more tries add noise; too large, and none are added.
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
    # Octaves from the best to the farther of those beside it; 0 for a single try
    best = _best(tries)
    spacing = max((abs(each.octave - best.octave) for each in _beside(tries)), default=0.0)
    if spacing <= FINEST:
        return False
    good = [each for each in tries if not each.diverged]
    if len(good) < 3 or any(each.diverged for each in _beside(tries)):
        return True
    noise = sd_of_run / math.sqrt(_best(tries).seeds)
    return _Curve(good).curvature / 4 * spacing**2 > COARSE * noise


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


class _Curve:
    """A polynomial p of x in octaves, by weighted least squares, and where it is least among the five best tries.

        min Σ r² / (h₅² + (2 h)²),    h = loss of a try − that of the best, h₅ of the fifth best

    So the best tries count nearly alike, and one far above them hardly: whatever their unit, spacing and noise.

    Args:
        tries: at least three, none of them diverged
        left_out: number of a try that is not fitted, of which the rest keeps its weights
    """

    def __init__(self, tries: Sequence[Try], left_out: int | None = None) -> None:
        import numpy as np

        octaves, losses = np.array([[each.octave, each.loss] for each in tries]).T
        heights = losses - losses.min()
        self._seeds = np.array([each.seeds for each in tries])
        self.spread = float(np.sort(heights)[:BEST][-1])
        self.middle = float(octaves[heights.argmin()])
        self.degree = 2 if len(tries) < 6 else 3  # a cubic of five would follow their noise
        unit = self.spread or float(heights.max()) or 1.0  # so that no square over- or underflows
        xs, best = octaves - self.middle, heights <= self.spread
        weights = 1 / np.hypot(1, STEEP * (heights / unit))
        if left_out is not None:
            weights[left_out] = 0
        design = np.vander(xs, self.degree + 1)
        self._inverse = np.linalg.pinv(design * weights[:, None]) * weights
        factors = unit * (self._inverse @ (heights / unit))
        self.cubic, self.square, self.slope, _ = (0.0,) * (3 - self.degree) + tuple(float(each) for each in factors)
        low, high = float(xs[best].min()), float(xs[best].max())
        self.least = min((low, high, *(x for x in self._turns() if low <= x <= high)), key=self._height)

    def _height(self, x: float) -> float:
        """p(x) − p(0), with x from the best try."""
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
    def curvature(self) -> float:
        """p″ / 2 at the vertex; 0 where that is not convex."""
        return max(3 * self.cubic * self.least + self.square, 0.0)

    @property
    def shake(self) -> float:
        """Var(x̂) over the variance of a run: x̂ is where p′ = 0, so that dx̂/dw_j = −j x̂^(j−1) / p″."""
        import numpy as np

        if not self.curvature:
            return math.inf
        powers = np.arange(self.degree, -1, -1)
        slope = powers * float(self.least) ** np.maximum(powers - 1, 0) / (2 * self.curvature)
        return float(np.sum((slope @ self._inverse) ** 2 / self._seeds))


def _regret(tries: Sequence[Try], curve: _Curve) -> float:
    """c Var(x̂), by the jackknife: (n − 1)/n Σ (x̂ᵢ − x̄)² over the fits that leave out one try each.

    So it holds the noise of the tries and what the polynomial misses of the curve. At most the spread of the tries,
    which is also the answer where the curve is not convex, or where no try can be left out.
    """
    if curve.curvature == 0 or len(tries) < 4:
        return curve.spread
    others = [_Curve(tries, i).vertex for i in range(len(tries))]
    middle = math.fsum(others) / len(others)
    variance = (1 - 1 / len(others)) * math.fsum((at - middle) ** 2 for at in others)
    return min(curve.curvature * variance, curve.spread)


# --- the tuning curve of an arm with its confidence bands -------------------------------------------------------------


CONFIDENCE = 0.95  # that the whole curve is within the bands


@dataclass(frozen=True)
class Bands:
    """Median of the best loss of k tries, for k from 1 to their number.

    Args:
        point: estimate
        low, high: bands; ``high`` is infinite where so few tries show no bound
    """

    point: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def bands(losses: Sequence[float], least: float = 0.0) -> Bands | None:
    """The curve of these tries; None if opda is not installed, or for fewer than two tries.

    Args:
        losses: final ones; a loss that is not finite, of a run that diverged, is infinite
        least: the smallest loss that is possible
    """
    if len(losses) < 2 or find_spec("opda") is None:
        return None
    import numpy as np
    from opda.nonparametric import EmpiricalDistribution

    final = [loss if math.isfinite(loss) else math.inf for loss in losses]
    tries = np.arange(1, len(losses) + 1)
    with warnings.catch_warnings():  # of equal losses, as of diverged runs: the bands are then wider than need be
        warnings.simplefilter("ignore", RuntimeWarning)
        of_shares = EmpiricalDistribution.confidence_bands(
            final, CONFIDENCE, a=least, generator=np.random.default_rng(0), method="ld_equal_tailed", n_jobs=1
        )
    below, middle, above = (tuple(map(float, each.quantile_tuning_curve(tries, minimize=True))) for each in of_shares)
    return Bands(middle, above, below)  # the lower band of the shares is the upper one of the losses


TUNE, COMPARE = "tune", "compare"  # stages of a plan
RATE = "optimizer.lr"
Arm = TypeVar("Arm", bound=Hashable)
SD_OF_RUN = 0.007  # nats, of a small model of text, where no measured noise is at hand


@dataclass(frozen=True)
class Aim:
    """The figure by which tries are judged.

    Args:
        metric: its name
        direction: in which it is better
    """

    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"

    @property
    def maximize(self) -> bool:
        return self.direction == "maximize"

    def loss(self, result: Result) -> float:
        """The figure of a run as a loss; infinite for a run that was lost."""
        return loss_of(result.value(self.metric), self.maximize)


def octaves(value: float, number: int) -> list[float]:
    """So many values an octave apart, around the composed one."""
    return [value * 2.0 ** (i - number // 2) for i in range(number)]


def next_round(tried: Mapping[Arm, Sequence[Try]], first: int, rounds: int, sd_of_run: float) -> dict[Arm, list[float]]:
    """Two more values for every arm, so that all have as many tries; empty if no arm needs them, or rounds are over.

    Args:
        tried: arm → its tries
        first: number of tries before the first round
        rounds: at most; the best of an arm may then still be at an edge
        sd_of_run: standard deviation of a run, in the unit of the losses
    """
    done = (max(map(len, tried.values())) - first) // 2
    if done >= rounds or not any(next_tries(tries, sd_of_run) for tries in tried.values()):
        return {}
    return {arm: further(tries) for arm, tries in tried.items()}


def composed_value(settings: Any, path: str, arm: str) -> float:
    """The composed value of a setting, around which it is tuned.

    Args:
        settings: the configuration of an arm
        path: of the setting
        arm: name, for the message

    Raises:
        ConfigError: it is not a positive number
    """
    value = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        rule = f"is tuned in octaves around its composed value, a positive number, but arm {arm} has {value!r} there"
        raise ConfigError(f"tune.{path}", arm, rule, "Write the path of a number, or tune=null")
    return float(value)


def loss_of(value: float | None, maximize: bool = False) -> float:
    """A figure as a loss: less is better, and nothing is worse than none."""
    return math.inf if value is None else -value if maximize else value
