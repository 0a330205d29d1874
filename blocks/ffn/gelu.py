from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.convolution.base import Convolution
from blockwright.blocks.ffn.plain import Plain
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("ffn", "gelu")
class GELU(Plain):
    """Two-layer feed-forward network with GELU.

    Hendrycks & Gimpel 2016, arXiv 1606.08415: y = W_down gelu(W_up x). GPT-2 adds biases and uses the tanh
    approximation, which deviates by up to 5e-4.

    Args:
        approximate: ``tanh`` as in GPT-2, ``sigmoid`` for x σ(1.702 x) as in CLIP, off by up to 0.02; ``none`` for the
            exact GELU
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        bias: bool = False,
        approximate: Literal["tanh", "none", "sigmoid"] = "tanh",
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, bias, up_conv)
        self.approximate = approximate

    def activated(self, u: Tensor) -> Tensor:
        sigmoid = self.approximate == "sigmoid"
        return u * (1.702 * u).sigmoid() if sigmoid else F.gelu(u, approximate=self.approximate)
