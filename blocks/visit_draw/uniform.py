from __future__ import annotations

import numpy as np

from blockwright.blocks.visit_draw.base import VisitDraw
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count


@register("visit_draw", "uniform")
class Uniform(VisitDraw):
    """Every number of visits from ``least`` to ``most`` is drawn equally often.

    Args:
        least: the fewest visits
        most: the most visits; null is the loop's ``visits``
    """

    def __init__(self, visits: int, least: Count = 1, most: Count | None = None) -> None:
        super().__init__()
        self.least, self.most = least, most or visits
        if self.least > self.most:
            raise BlockError("least", least, f"is above the most visits ({self.most})", "Lower it, or raise most")

    def draw(self, generator: np.random.Generator) -> int:
        return int(generator.integers(self.least, self.most, endpoint=True))
