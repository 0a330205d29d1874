from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from blockwright.blocks.visit_draw.base import MOST, VisitDraw
from blockwright.registry import register

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
