from __future__ import annotations

from blockwright.blocks.loop.base import Core, Loop
from blockwright.registry import register


@register("loop", "repeat")
class Repeat(Loop):
    """Each layer is a core of its own: with 3 visits of layers 1 and 2, a pass is 0 1 1 1 2 2 2 3.

    Bae et al. 2025 (mixture of recursions), arXiv 2507.10524, call it sequence. The shared adjacent blocks of Liu et
    al. 2024 (MobileLLM), arXiv 2402.14905, are this with two visits. ``entry`` is one block for all cores.
    """

    def cores(self) -> list[Core]:
        return [(index,) for index in self.looped]
