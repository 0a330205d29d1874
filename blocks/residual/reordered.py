from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "reordered")
class Reordered(Residual):
    """Norm on the output of each mixer; neither its input nor the stream is normalised.

    OLMo-2, arXiv 2501.00656 ("reordered norm", after Swin v2): x ← x + norm₁(attention(x)); x ← x + norm₂(ffn(x)).
    OLMo-2 also has ``qk_norm: full``.

    Args:
        attention_norm: norm of the attention's output
        ffn_norm: norm of the feed-forward block's output
    """

    def __init__(self, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = x + self.attention_norm(attention(x))
        return x + self.ffn_norm(ffn(x))
