from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.entry.base import Entry, Norm
from blockwright.registry import register


@register("entry", "add")
class Add(Entry):
    """What entered the loop is added to each further visit: h ← core(h + e), in the first visit h ← core(e).

    Looped transformers, Yang et al. 2023, arXiv 2311.12424, with h₀ = 0; deep equilibrium models.
    """

    injects: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        return x + entered if n else x
