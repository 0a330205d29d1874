from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("ffn", "gelu")
class GELU(FFN):
    """Two-layer feed-forward network with GELU.

    Hendrycks & Gimpel 2016, arXiv 1606.08415: y = W_down gelu(W_up x). GPT-2 adds biases and uses the tanh
    approximation, which deviates by up to 5e-4.

    Args:
        d_ff: F, hidden width; null is 4 d_model
        bias: whether both layers add a bias
        approximate: ``tanh`` as in GPT-2, ``sigmoid`` for x σ(1.702 x) as in CLIP, off by up to 0.02; ``none`` for the
            exact GELU
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        bias: bool = False,
        approximate: Literal["tanh", "none", "sigmoid"] = "tanh",
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.up = Linear(d_model, d_ff or 4 * d_model, bias=bias)
        self.down = Linear(d_ff or 4 * d_model, d_model, bias=bias)

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        x = self.up(x)
        sigmoid = self.approximate == "sigmoid"
        return self.down(x * (1.702 * x).sigmoid() if sigmoid else F.gelu(x, approximate=self.approximate)), None

    def parallel_plan(self) -> dict[str, Placement]:
        biases: dict[str, Placement] = {"up.bias": "column", "down.bias": "replicate"}
        return {"up.weight": "column", "down.weight": "row", **(biases if self.up.bias is not None else {})}
