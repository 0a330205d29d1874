from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from blockwright.blocks.visit_draw.base import MOST, VisitDraw
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count

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
