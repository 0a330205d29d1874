from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.base import Placement
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("ffn", "relu2")
class ReLU2(FFN):
    """Two-layer feed-forward network with a squared ReLU.

    So et al. 2021 (Primer), arXiv 2109.08668: y = W_down relu(W_up x)². No biases.

    Args:
        d_ff: F, hidden width; null is 4 d_model
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(self, d_model: int, d_ff: Count | None = None) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff or 4 * d_model, bias=False)
        self.down = Linear(d_ff or 4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.down(F.relu(self.up(x)).square()), None

    def parallel_plan(self) -> dict[str, Placement]:
        return {"up.weight": "column", "down.weight": "row"}
