from __future__ import annotations

from blockwright.blocks.loop.base import Core, Loop
from blockwright.registry import register


@register("loop", "repeat")
class Repeat(Loop):
    """Each layer is a core of its own: with 3 visits of layers 1 and 2, a pass is 0 1 1 1 2 2 2 3.

    Mixture of recursions, arXiv 2507.10524, calls it sequence; MobileLLM's sharing of adjacent blocks, arXiv
    2402.14905, is this with two visits. ``entry`` is one block for all cores.
    """

    def cores(self) -> list[Core]:
        return [(index,) for index in self.looped]
