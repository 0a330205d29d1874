from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "parallel")
class Parallel(Residual):
    """Both mixers read the same normalised input, and their outputs are added together.

    Wang & Komatsuzaki 2021 (GPT-J); PaLM: h = norm(x); x ← x + attention(h) + ffn(h). One norm, as in GPT-J and PaLM;
    GPT-NeoX has two.

    Args:
        attention_norm: the one norm, before both mixers
    """

    adds_branches = True

    def __init__(self, attention_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        h = self.attention_norm(x)
        return x + attention(h) + ffn(h)
