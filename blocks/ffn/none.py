from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import register


@register("ffn", "none")
class NoFFN(FFN):
    """No feed-forward block: y = 0, for layers that only mix tokens.

    Nemotron-H, arXiv 2504.03624. With ``residual: {name: prenorm, ffn_norm: none}`` the layer has no
    norm for it either.
    """

    empty: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return x * 0, None  # not zeros: the norm before it must have a gradient, or data parallelism stops
