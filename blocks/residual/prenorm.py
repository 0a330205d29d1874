from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "prenorm")
class PreNorm(Residual):
    """Norm before each mixer; the stream itself is never normalised.

    Xiong et al. 2020, arXiv 2002.04745: x ← x + attention(norm₁(x)); x ← x + ffn(norm₂(x)). Llama, DeepSeek, GPT-2.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
    """

    adds_branches = True

    def __init__(self, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = x + attention(self.attention_norm(x))
        return x + ffn(self.ffn_norm(x))
