from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "sandwich")
class Sandwich(Residual):
    """Norm before each mixer and on its output.

    Ding et al. 2021 (CogView), arXiv 2105.13290; Gemma-2: x ← x + norm₂(attention(norm₁(x))), likewise for the ffn.

    Args:
        attention_norm: norm before the attention
        attention_out_norm: norm of the attention's output
        ffn_norm: norm before the feed-forward block
        ffn_out_norm: norm of the feed-forward block's output
    """

    def __init__(self, attention_norm: Norm, attention_out_norm: Norm, ffn_norm: Norm, ffn_out_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention_out_norm = attention_out_norm
        self.ffn_norm = ffn_norm
        self.ffn_out_norm = ffn_out_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = x + self.attention_out_norm(attention(self.attention_norm(x)))
        return x + self.ffn_out_norm(ffn(self.ffn_norm(x)))
