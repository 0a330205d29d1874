"""The contract of ``ffn``: transform each token by itself."""

from __future__ import annotations

from torch import Tensor

from blocks.base import Block
from blocks.gating.base import Routing
from registry import family


@family("ffn")
class FFN(Block):
    """A feed-forward block, dense or a mixture of experts."""

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """x [B,T,D] → the transformed tokens [B,T,D], and how they were routed (None when dense)."""
        raise NotImplementedError


def rounded_width(exact: float, multiple: int = 64) -> int:
    """The next multiple, as matmul units like it."""
    return -int(-exact // multiple) * multiple
