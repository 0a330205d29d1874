"""One scaling law for all arms of a ladder: a shared shape, and how much further each arm gets with its size and data.

    L_k(N, D) = E + A (ρ_N,k N)^−α + B (ρ_D,k D)^−β        ρ of the baseline is 1

L is the loss in nats of a training whose rate has decayed, N the parameters without embedding and head, D the tokens of
training. The form is that of Hoffmann et al. (2022, arXiv:2203.15556). Shared exponents with factors of each arm are
those of Volkova et al. (2026, arXiv:2602.07712) for optimizers, because a law for each arm alone is ill-conditioned.

An arm has the loss at (N, D) that the baseline has at (ρ_N N, ρ_D D). So at the best split of the compute 6ND into size
and data the arm is faster by s = ρ_N ρ_D, whatever the budget. Lines other than the best split: law_speed.py.

The fit (law_fit.py) is by least squares from 12 starts, then again with what the residuals share (law_noise.py): the
arms of a seed, which see the same data, and the durations of a training, which are decays of one trunk. A robust loss
is not needed, since a diverged training is a lost one. Intervals are Student's, with the degrees of freedom that each
estimate has; in simulations they cover .93 to .97 at 95 % (tests/lab/statistics/test_law.py). As many degrees as there
are pairs of size and seed, which is a third of what s has, made them cover .98.

Left out, since they cover less: a bootstrap over three seeds (.84), and one over the points of a curve, which are not
independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blockwright.lab.statistics.variance import Left

Array = NDArray[np.float64]
Form = Literal["apart", "alike"]
SHAPE = 5  # parameters of the law's shape: log E, log of the two terms at the mean rung, log α, log β


@dataclass(frozen=True)
class Rung:
    """The end of one training.

    Args:
        arm: its name
        size: name of the size, shared by the arms that are matched at it
        duration: name of the duration
        seed: of initialisation and data
        parameters: N, without embedding and head
        tokens: D
        loss: in nats, after the decay
    """

    arm: str
    size: str
    duration: str
    seed: int
    parameters: float
    tokens: float
    loss: float


def largest(rungs: Sequence[Rung]) -> Rung:
    """One of the largest size, and of the longest duration there."""
    return max(rungs, key=lambda rung: (rung.parameters, rung.tokens))


@dataclass(frozen=True)
class Common:
    """What tuning leaves in an arm at some sizes, whose trainings have one value, or values that follow from others.

    Args:
        arm: its name
        sizes: names
        left: its variance in nats², with degrees of freedom
    """

    arm: str
    sizes: frozenset[str]
    left: Left

    def has(self, rung: Rung) -> bool:
        return rung.arm == self.arm and rung.size in self.sizes


@dataclass(frozen=True)
class Ladder:
    """Rungs as arrays.

    Args:
        rungs: as given
        arms: their names, the baseline first
        form: ``apart``: each arm has a ρ_N and a ρ_D; ``alike``: ρ_N = ρ_D = √s
        n, d: log N and log D, less ``center``
        center: the means of log N and log D
        size_gain, data_gain: [rungs, gains], which times the gains are log ρ_N and log ρ_D of the rungs
        common: what tuning leaves
    """

    rungs: tuple[Rung, ...]
    arms: tuple[str, ...]
    form: Form
    n: Array
    d: Array
    center: tuple[float, float]
    size_gain: Array
    data_gain: Array
    common: tuple[Common, ...] = ()

    @property
    def losses(self) -> Array:
        return np.array([rung.loss for rung in self.rungs])

    @property
    def number(self) -> int:
        """Of parameters."""
        return SHAPE + self.size_gain.shape[1]

    @property
    def trunks(self) -> int:
        """Pairs of size and seed: what is independent."""
        return len({(rung.size, rung.seed) for rung in self.rungs})


def arranged(rungs: Sequence[Rung], baseline: str, form: Form, common: Sequence[Common] = ()) -> Ladder:
    """Rungs as arrays.

    Args:
        rungs: of all arms
        baseline: the arm whose ρ are 1
        form, common: see ``Ladder``
    """
    arms = (baseline, *dict.fromkeys(rung.arm for rung in rungs if rung.arm != baseline))
    n, d = (np.log([getattr(rung, name) for rung in rungs]) for name in ("parameters", "tokens"))
    size_gain, data_gain = gains_of(arms, [rung.arm for rung in rungs], form)
    center = float(n.mean()), float(d.mean())
    return Ladder(tuple(rungs), arms, form, n - center[0], d - center[1], center, size_gain, data_gain, tuple(common))


def gains_of(arms: Sequence[str], of: Sequence[str], form: Form) -> tuple[Array, Array]:
    """The matrices that give log ρ_N and log ρ_D of some arms from the gains of all arms."""
    is_arm = np.array([[float(name == arm) for arm in arms[1:]] for name in of]).reshape(len(of), len(arms) - 1)
    if form == "alike":
        return is_arm / 2, is_arm / 2
    return np.hstack([is_arm, 0 * is_arm]), np.hstack([0 * is_arm, is_arm])


def predict(theta: Array, n: Array, d: Array, size_gain: Array, data_gain: Array) -> tuple[Array, Array]:
    """Losses of the law, and their derivatives by its parameters.

    Args:
        theta: log E, the logs of both terms at n = d = 0, log α, log β, the gains
        n, d, size_gain, data_gain: as in ``Ladder``
    """
    floor, alpha, beta = np.exp(theta[[0, 3, 4]])
    size, data = n + size_gain @ theta[SHAPE:], d + data_gain @ theta[SHAPE:]
    of_size, of_data = np.exp(theta[1] - alpha * size), np.exp(theta[2] - beta * data)
    shape = [np.full_like(n, floor), of_size, of_data, -alpha * of_size * size, -beta * of_data * data]
    gains = -(alpha * of_size)[:, None] * size_gain - (beta * of_data)[:, None] * data_gain
    return floor + of_size + of_data, np.column_stack([*shape, gains])
