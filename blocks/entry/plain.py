from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.entry.base import Entry, Norm
from blockwright.registry import register


@register("entry", "plain")
class Plain(Entry):
    """A visit reads what the visit before made: h ← core(h). So a loop is a deeper model with shared weights."""

    one_stream: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        return x
