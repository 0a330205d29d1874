"""The contract of ``ffn``: transform each token independently."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

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
                takes ``experts``, those of an earlier routing, and ``real``, which are no padding (``Gating.forward``)

        Returns:
            [B,T,D], and the routing of the tokens (None when dense)
        """
        raise NotImplementedError


def takes_real(ffn: nn.Module) -> bool:
    """Whether a feed-forward block's ``forward`` names ``real``: then it is given which tokens are not padding."""
    return "real" in inspect.signature(type(ffn).forward).parameters


def rounded_width(exact: float, multiple: int = 64) -> int:
    """``exact`` rounded up to a multiple, which matmul units prefer."""
    return -int(-exact // multiple) * multiple
