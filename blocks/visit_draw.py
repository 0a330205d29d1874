"""The contract of ``visit_draw``: how many visits of a loop a training step makes. A child of ``loop``."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from blockwright.blocks.base import Block
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count

MOST = 1024  # visits; more would take days, and a file of unknown origin may ask for any number


@family("visit_draw", context=("visits",), in_layers=False)
class VisitDraw(Block):
    """Draws a number of visits for each step. Context: ``visits``, r outside of training.

    All ranks draw the same, and a resumed run draws what the whole run drew: the seed is that of the run and the step.
    """

    def visits_of(self, seed: int) -> int:
        """The visits of a step, from 1 to ``MOST``."""
        return min(max(self.draw(np.random.default_rng(seed)), 1), MOST)

    def draw(self, generator: np.random.Generator) -> int:
        """A number of visits; what is beyond the bounds is cut off. It is drawn by NumPy, on no device of torch."""
        raise NotImplementedError


Mean = Annotated[float, Gt(0), Le(MOST)]
Spread = Annotated[float, Ge(0), Le(10)]


@register("visit_draw", "poisson_lognormal")
class PoissonLognormal(VisitDraw):
    """Mostly few visits, sometimes many: a Poisson number with a log-normal rate.

    Huginn, arXiv 2502.05171: τ ~ N(log r̄ − σ²/2, σ²), r ~ Poisson(e^τ) + 1, so that its mean is r̄ + 1. The paper draws
    one r for each micro-batch of the ranks alike; here micro-batches of a step share it.

    Args:
        mean: r̄; null is the loop's ``visits``
        sigma: σ, of the logarithm of the rate
    """

    def __init__(self, visits: int, mean: Mean | None = None, sigma: Spread = 0.5) -> None:
        super().__init__()
        self.mean, self.sigma = mean or float(visits), sigma

    def draw(self, generator: np.random.Generator) -> int:
        rate = math.exp(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * generator.standard_normal())
        return int(generator.poisson(min(rate, MOST))) + 1


Visits = Annotated[int, Ge(1), Le(MOST)]


@register("visit_draw", "uniform")
class Uniform(VisitDraw):
    """Every number of visits from ``least`` to ``most`` is drawn equally often.

    Args:
        least: the fewest visits
        most: the most visits; null is the loop's ``visits``
    """

    def __init__(self, visits: int, least: Count = 1, most: Visits | None = None) -> None:
        super().__init__()
        self.least, self.most = least, most or visits
        if self.least > self.most:
            raise BlockError("least", least, f"is above the most visits ({self.most})", "Lower it, or raise most")

    def draw(self, generator: np.random.Generator) -> int:
        return int(generator.integers(self.least, self.most, endpoint=True))
