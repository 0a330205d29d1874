from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32, full_linear, unlowered
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "sigmoid_skip")
class SigmoidSkip(Residual):
    """Each token decides how much of a layer it takes.

    A soft form of mixture of depths, and a highway network (Srivastava et al. 2015, arXiv 1505.00387) that carries all:
    y = attention(norm₁(x)); x ← x + 2σ(w·x + b) (y + ffn(norm₂(x + y))). It begins as ``prenorm``: w and b are 0, hence
    the factor 2, which papers leave out. Every layer is computed for every token, so that nothing is saved; a token for
    which σ is near 0 shows where something could be. The gate is in fp32 at least.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}

    def __init__(self, d_model: int, attention_norm: Norm, ffn_norm: Norm) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm
        self.weight = nn.Parameter(torch.empty(1, d_model))
        self.bias = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.bias.zero_()

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        y = attention(self.attention_norm(x))
        y = y + ffn(self.ffn_norm(x + y))
        return x + self._share(x) * y

    def _share(self, x: Tensor) -> Tensor:
        with unlowered(x):
            flat = full_linear(at_least_fp32(x.flatten(0, 1)), at_least_fp32(self.weight), at_least_fp32(self.bias))
            return (2 * flat.sigmoid()).to(x.dtype).view(*x.shape[:2], 1)
