"""The contract of ``projector``: bring a vision tower's features to the decoder's width."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block
from blockwright.blocks.linear import Linear
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count


@family("projector", context=("width", "side"), in_layers=False)
class Projector(Block):
    """Turns S × S features of width W into s × s embeddings of width D.

    Attributes:
        side_out: s
    """

    catalogue_example: ClassVar[Any] = "downsample_mlp"

    counted_as: ClassVar[str | None] = "projector"

    side_out: int

    def forward(self, features: Tensor) -> Tensor:
        """[N,S,S,W] → [N,s,s,D]."""
        raise NotImplementedError


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


@register("projector", "downsample_mlp")
class DownsampleMLP(Projector):
    """Squares of features side by side as one, then an MLP: ``downsample_mlp_gelu`` of DeepSeek-VL2, arXiv 2412.10302.

    The features are padded with zeros on the right and below until ratio divides their side, then ratio × ratio of them
    become one of width ratio² W, feature by feature: index w·ratio² + dy·ratio + dx, the order of ``F.unfold`` and not
    of a pixel shuffle. The MLP's GELU is exact, where the tower's is an approximation.

    Args:
        ratio: features a side of a square
        depth: linear layers, all with bias
        mlp_ratio: width between them, in units of d_model
    """

    def __init__(
        self, d_model: int, width: int, side: int, ratio: Count = 2, depth: Count = 2, mlp_ratio: Count = 1
    ) -> None:
        super().__init__()
        if ratio > side:
            rule = f"must not be larger than the side of the tower's features ({side})"
            raise BlockError("ratio", ratio, rule, "Lower it, or give the tower smaller patches")
        self.ratio, self.side_out = ratio, -(-side // ratio)
        widths = [width * ratio * ratio, *[d_model * mlp_ratio] * (depth - 1), d_model]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, features: Tensor) -> Tensor:
        s, r, missing = self.side_out, self.ratio, self.side_out * self.ratio - features.shape[1]
        squares = F.pad(features, (0, 0, 0, missing, 0, missing)).unflatten(2, (s, r)).unflatten(1, (s, r))
        x = self.layers[0](squares.permute(0, 1, 3, 5, 2, 4).flatten(3))
        for layer in list(self.layers)[1:]:
            x = layer(F.gelu(x))
        return x


@register("projector", "linear", fixes={"ratio": 1, "depth": 1, "mlp_ratio": 1})
class LinearProjector(DownsampleMLP):
    """One linear layer on each feature, as in the first LLaVA, arXiv 2304.08485."""


@register("projector", "mlp", fixes={"ratio": 1})
class MLP(DownsampleMLP):
    """An MLP on each feature, with as many embeddings as features.

    LLaVA-1.5 (Liu et al. 2024, arXiv 2310.03744) with the defaults, ``mlp_gelu`` of DeepSeek-VL2's code.
    """
