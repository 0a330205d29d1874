from __future__ import annotations

from torch import Tensor

from blockwright.blocks.selector.base import Asked, Held, Selector
from blockwright.registry import register


@register("selector", "below")
class Below(Selector):
    """What the nearest layer below chose, whichever selector it has: no parameters, nothing cached.

    IndexCache, arXiv 2603.12201; GLM-5.2: a layout of ``selector`` with this as a variant gives any pattern of layers
    that choose and layers that reuse. ``shared`` gives the regular one. Where no layer below has chosen, it sees all.
    """

    reuses = True

    def __init__(self) -> None:
        super().__init__()

    def takes_all(self, n_keys: int) -> bool:
        return False

    def forward(self, asked: Asked, held: Held) -> Tensor | None:
        return held.before
