"""The contract of ``mixing``: how residual streams exchange what they hold. A child of ``residual``."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.registry import family


@family("mixing", context=("n_streams",))
class Mixing(Block):
    """Turns logits of each token into a matrix [M,M], and multiplies the streams by it. Context: ``n_streams``, M.

    Attributes:
        n_logits: L, logits that a token gives
    """

    n_logits: int

    def start(self) -> Tensor:
        """Logits [L] at which streams stay nearly apart."""
        raise NotImplementedError

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Streams [B,T,M,D] and fp32 logits [B,T,L] → streams [B,T,M,D]."""
        raise NotImplementedError


APART = -8.0  # a logit of what leaves its stream, beside 0 for what stays: e⁻⁸ is 0.03 %
