"""The contract of ``ffn``: transform each token independently."""

from __future__ import annotations

from torch import Tensor

from blocks.base import Block
from blocks.gating.base import Routing
from registry import family


@family("ffn")
class FFN(Block):
    """A feed-forward block, dense or a mixture of experts."""

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """Transform each token.

        Args:
            x: [B,T,D]
            tokens: [B,T] ids, for gates that route by them; the decoder always passes them. A block that routes also
                takes ``experts``, those of an earlier routing (see ``Gating.forward``)

        Returns:
            [B,T,D], and the routing of the tokens (None when dense)
        """
        raise NotImplementedError


def rounded_width(exact: float, multiple: int = 64) -> int:
    """``exact`` rounded up to a multiple, which matmul units prefer."""
    return -int(-exact // multiple) * multiple
