from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.plugins.surgery.transplant.base import Transplanted
from blockwright.plugins.surgery.transplant.heads import Heads
from blockwright.registry import register


@register("transplant", "repeat_heads")
class RepeatHeads(Heads):
    """Grouped-query attention → more heads of keys and values (gqa → mha), each a copy. Exact."""

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"attention": {"name": "mha", "n_heads": 4}})

    def suits(self, there: int, here: int) -> bool:
        return here > there and here % there == 0

    def result(self, tensors: dict[str, Tensor]) -> Transplanted:
        return Transplanted(tensors, frozenset(tensors), exact=True, note="heads of keys and values repeated")
