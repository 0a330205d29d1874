from __future__ import annotations

from torch import Tensor

from blockwright.plugins.vision.projector.base import Projector
from blockwright.registry import BlockError, register


@register("projector", "identity")
class Identity(Projector):
    """The tower's features as they are: its width is the decoder's."""

    def __init__(self, d_model: int, width: int, side: int) -> None:
        super().__init__()
        if width != d_model:
            rule = f"passes features of width {width} to a decoder of d_model {d_model}"
            raise BlockError("projector", "identity", rule, "Use linear, or a tower of the decoder's width")
        self.side_out = side

    def forward(self, features: Tensor) -> Tensor:
        return features
