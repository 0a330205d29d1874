from __future__ import annotations

from collections.abc import Sequence

from blockwright.plugins.surgery.growth.base import Growth
from blockwright.registry import register


@register("growth", "zeroed")
class Zeroed(Growth):
    """Copies between the layers, whose outputs begin at zero.

    Wu et al. 2024 (LLaMA-Pro), arXiv 2401.02415: after every few layers stands a copy of the last of them with its
    output matrices at zero. Exact where a layer adds to the residual stream. A shallower model keeps layers evenly
    spread, which is not exact.
    """

    def sources(self, there: int, here: int) -> Sequence[int]:
        return [i * there // here for i in range(here)]

    def silent(self, there: int, here: int) -> frozenset[int]:
        sources = self.sources(there, here)
        return frozenset(i for i in range(1, here) if sources[i] == sources[i - 1])
