from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.sandwich import Sandwich
from blockwright.registry import register


@register("residual", "scaled_sandwich")
class ScaledSandwich(Sandwich):
    """``sandwich``, after which the whole stream is multiplied by a number of the layer.

    Gemma 4 (``layer_scalar``): x ← s (x + norm₂(attention(norm₁(x))) + …), after everything that the layer adds, its
    memory too. The number is a buffer, which training leaves alone; it starts at 1.

    Args:
        attention_norm: norm before the attention
        attention_out_norm: norm of the attention's output
        ffn_norm: norm before the feed-forward block
        ffn_out_norm: norm of the feed-forward block's output
    """

    scale: Tensor

    def __init__(self, attention_norm: Norm, attention_out_norm: Norm, ffn_norm: Norm, ffn_out_norm: Norm) -> None:
        super().__init__(attention_norm, attention_out_norm, ffn_norm, ffn_out_norm)
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
        self.scale.fill_(1.0)

    def leave(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)
