from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "postnorm")
class PostNorm(Residual):
    """Norm after each addition: the stream is normalised at every step.

    Vaswani et al. 2017, arXiv 1706.03762: x ← norm₁(x + attention(x)); x ← norm₂(x + ffn(x)). Needs warm-up at depth.
    OLMo-2's "reordered norm", x + norm(f(x)), is not this: there the stream stays unnormalised.

    Args:
        attention_norm: norm after the attention has been added
        ffn_norm: norm after the feed-forward block has been added
    """

    def __init__(self, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = self.attention_norm(x + attention(x))
        return self.ffn_norm(x + ffn(x))
