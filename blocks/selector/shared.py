from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.selector.base import Asked, Held, Selector
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("selector", "shared")
class Shared(Selector):
    """Another selector in one layer of some, whose choice the layers above it reuse.

    IndexCache, arXiv 2603.12201; GLM-5.2: adjacent layers choose much alike, so most indexers can go. Layer l
    has a selector of its own where ``every`` divides l; any other sees what the nearest layer below chose, whichever
    selector that had: a layout with variants of ``selector`` gives other patterns. IndexCache also trains the layers
    that choose for those that reuse; here they learn from their own attention.

    It has no parameters beside the other's, and layers that reuse cache nothing for it. Where the choice is of each
    head, attentions have as many heads. A layer of multi-token prediction has none below it, and sees all keys if it
    has none of its own.

    Args:
        of: the selector
        every: layers to a selector
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "of": {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4},
        "every": 2,
    }

    def __init__(self, layer_idx: int, of: Selector, every: Count = 4) -> None:
        super().__init__()
        self.of = None if layer_idx % every else of
        self.reuses, self.learns, self.per_head = self.of is None, self.of is not None and of.learns, of.per_head

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {} if self.of is None else self.of.slots()

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return () if self.of is None else self.of.remember(x, positions, declared)

    def takes_all(self, n_keys: int) -> bool:
        return self.of is not None and self.of.takes_all(n_keys)

    def forward(self, asked: Asked, held: Held) -> Tensor | None:
        return held.before if self.of is None else self.of(asked, held)

    def losses(
        self, asked: Asked, held: Held, chosen: Tensor | None, scale: float, bias: Tensor | None
    ) -> dict[str, Tensor]:
        return {} if self.of is None else self.of.losses(asked, held, chosen, scale, bias)
