from __future__ import annotations

from torch import Tensor

from blockwright.blocks.closing.base import Closing
from blockwright.registry import register


@register("closing", "mean")
class Mean(Closing):
    """The mean of the streams, as in GLM-5.3; to a norm the same as their sum, of hyper-connections' paper."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)
