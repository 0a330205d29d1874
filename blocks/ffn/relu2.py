from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.ffn.plain import Plain
from blockwright.registry import register


@register("ffn", "relu2", fixes={"bias": False})
class ReLU2(Plain):
    """Two-layer feed-forward network with a squared ReLU.

    So et al. 2021 (Primer), arXiv 2109.08668: y = W_down relu(W_up x)². No biases.
    """

    def activated(self, u: Tensor) -> Tensor:
        return F.relu(u).square()
