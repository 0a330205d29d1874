from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.linear import Linear
from blockwright.plugins.vision.projector.base import Projector
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count


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
