from __future__ import annotations

from collections.abc import Sequence

from blockwright.plugins.surgery.growth.base import Growth
from blockwright.registry import register


@register("growth", "stacked")
class Stacked(Growth):
    """The whole stack again and again: layer i starts as layer i mod L.

    Du et al. 2024 (G_stack), arXiv 2405.15319: the best of eight ways to grow that they compare. Not exact.
    """

    def sources(self, there: int, here: int) -> Sequence[int]:
        return [i % there for i in range(here)]
