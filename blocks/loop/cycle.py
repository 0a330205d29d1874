from __future__ import annotations

from blockwright.blocks.loop.base import Core, Loop
from blockwright.registry import register


@register("loop", "cycle")
class Cycle(Loop):
    """The layers are one core, which is visited as a whole: 0 (1 2)*3 3 is 0 1 2 1 2 1 2 3.

    Universal Transformer, arXiv 1807.03819; Huginn, arXiv 2502.05171; Ouro, arXiv 2510.25741, whose core is the whole
    model. Bae et al. 2025 (mixture of recursions), arXiv 2507.10524, call it cycle, and middle-cycle with a prelude and
    a coda.
    """

    def cores(self) -> list[Core]:
        return [tuple(self.looped)]
