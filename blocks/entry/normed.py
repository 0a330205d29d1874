from __future__ import annotations

from torch import Tensor

from blockwright.blocks.entry.base import Entry, Norm
from blockwright.registry import register


@register("entry", "normed")
class Normed(Entry):
    """The model's final norm is between visits: h ← core(norm(h)), in the first visit h ← core(e).

    Ouro, arXiv 2510.25741, whose released code normalises the stream after every visit of the whole model by one norm.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        return norm(x) if n else x
