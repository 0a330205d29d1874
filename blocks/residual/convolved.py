from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.convolution import Convolution, convolved
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.residual.base import Around, Mixer, Residual
from blockwright.registry import BlockError, register


@register("residual", "convolved")
class Convolved(Around):
    """Another residual block, whose mixers read and return what convolutions make of the last few tokens.

    Canon layers A and C (Allen-Zhu 2025, SSRN 5240330) are ``attention_conv`` and ``ffn_conv``: h ← conv(norm(x)), then
    the mixer reads h. Inkling's are ``attention_out_conv`` and ``ffn_out_conv``: x ← x + conv(mixer(norm(x))). Norms
    and streams are those of the inner block, which is any. Sparse experts read what ``ffn_conv`` gives, and have no
    convolution inside.

    Args:
        residual: connects the mixers; ``prenorm`` if none is named
        attention_conv: of what the attention reads, after its norm; null for none
        attention_out_conv: of what the attention returns; null for none
        ffn_conv: of what the feed-forward block reads, after its norm; null for none
        ffn_out_conv: of what the feed-forward block returns; null for none
    """

    default_children: ClassVar[Mapping[str, Any]] = {"residual": {"name": "prenorm"}}

    def __init__(
        self,
        residual: Residual,
        attention_conv: Convolution | None = None,
        attention_out_conv: Convolution | None = None,
        ffn_conv: Convolution | None = None,
        ffn_out_conv: Convolution | None = None,
    ) -> None:
        super().__init__(residual)
        self.attention_conv, self.attention_out_conv = attention_conv, attention_out_conv
        self.ffn_conv, self.ffn_out_conv = ffn_conv, ffn_out_conv
        after = (conv for conv in (attention_out_conv, ffn_out_conv) if conv is not None)
        self.adds_branches = residual.adds_branches and all(conv.scales for conv in after)
        if self.selects and (conv := ffn_conv or ffn_out_conv) is not None:
            rule = f"needs tokens side by side, and {type(residual).__name__} gives the feed-forward block some of them"
            name = "ffn_conv" if conv is ffn_conv else "ffn_out_conv"
            raise BlockError(name, type(conv).__name__, rule, "Leave it out; convolutions of the attention may stay")

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        def attend(h: Tensor, places: Tensor | None = None) -> Tensor:
            y = attention(convolved(self.attention_conv, h, given), places)
            return convolved(self.attention_out_conv, y, given)

        def feed(h: Tensor, places: Tensor | None = None) -> Tensor:
            return convolved(self.ffn_out_conv, ffn(convolved(self.ffn_conv, h, given), places), given)

        return super().forward(x, attend, feed, given)
