"""The contract of ``ffn``: transform each token independently."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.registry import family


@family("ffn")
class FFN(Block):
    """A feed-forward block, dense or a mixture of experts.

    Class attributes:
        crosses_depth: whether it takes what the feed-forward block of the layer below leaves

    Attributes:
        leaves: whether it leaves something for that of the layer above, which has to take it
    """

    crosses_depth: ClassVar[bool] = False
    leaves: bool = False

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        """Transform each token.

        Args:
            x: [B,T,D]
            given: further data of the tokens; None if x is all there is, as in an input

        Returns:
            [B,T,D], and the routing of the tokens (None when dense)
        """
        raise NotImplementedError


def rounded_width(exact: float, multiple: int = 64) -> int:
    """``exact`` rounded up to a multiple, which matmul units prefer."""
    return -int(-exact // multiple) * multiple
