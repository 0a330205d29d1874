from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "pre_postnorm")
class PrePostNorm(Residual):
    """Norm before each mixer, and on the stream after each addition.

    Huginn, arXiv 2502.05171, whose code calls this a sandwich: x ← norm₂(x + attention(norm₁(x))), likewise for the
    ffn.
    ``sandwich`` is Gemma-2's, whose second norm is on the mixer's output, and whose stream stays unnormalised.

    Args:
        attention_norm: norm before the attention
        attention_sum_norm: norm after the attention has been added
        ffn_norm: norm before the feed-forward block
        ffn_sum_norm: norm after the feed-forward block has been added
    """

    def __init__(self, attention_norm: Norm, attention_sum_norm: Norm, ffn_norm: Norm, ffn_sum_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention_sum_norm = attention_sum_norm
        self.ffn_norm = ffn_norm
        self.ffn_sum_norm = ffn_sum_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = self.attention_sum_norm(x + attention(self.attention_norm(x)))
        return self.ffn_sum_norm(x + ffn(self.ffn_norm(x)))
