from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.convolution.base import Convolution, convolved
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry.ranges import Count


class Plain(FFN):
    """y = W_down act(W_up x): the shared base of ``gelu``, ``relu2`` and ``xielu``, which have ``activated``.

    Args:
        d_ff: F, hidden width; null is 4 d_model
        bias: whether both layers add a bias
        up_conv: convolves the hidden layer over the last few tokens, before the activation; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(
        self, d_model: int, d_ff: Count | None = None, bias: bool = False, up_conv: Convolution | None = None
    ) -> None:
        super().__init__()
        width = d_ff or 4 * d_model
        self.up = Linear(d_model, width, bias=bias)
        self.down = Linear(width, d_model, bias=bias)
        self.up_conv = up_conv

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_ff"] or 4 * known["d_model"]}

    def activated(self, u: Tensor) -> Tensor:
        """[B,T,F] → [B,T,F]."""
        raise NotImplementedError

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.down(self.activated(convolved(self.up_conv, self.up(x), given))), None

    def parallel_plan(self) -> dict[str, Placement]:
        biases: dict[str, Placement] = {"up.bias": "column", "down.bias": "replicate"}
        return {"up.weight": "column", "down.weight": "row", **(biases if self.up.bias is not None else {})}
