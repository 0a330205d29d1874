"""The contract of ``closing``: how residual streams become one after the last layer. A child of ``residual``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block, Kind
from blockwright.blocks.precision import at_least_fp32, full_linear, unlowered
from blockwright.registry import family, register
from blockwright.registry.ranges import Positive


@family("closing", context=("n_streams",))
class Closing(Block):
    """Turns the streams into the input of the final norm. Context: ``n_streams``, M.

    Every layer's residual has one, and only the last layer's is used: one with parameters has them there alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Streams [B,T,M,D] → [B,T,D]."""
        raise NotImplementedError


@register("closing", "mean")
class Mean(Closing):
    """The mean of the streams, as in GLM-5.3; to a norm the same as their sum, of hyper-connections' paper."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


@register("closing", "weighted")
class Weighted(Closing):
    """A sum of the streams with weights that depend on the token, as in DeepSeek-V4.

    a = W r with r = vec(X)/√(mean vec(X)² + ε); y = Σ_i (σ(s a_i + b_i) + ε) X_i. It begins as the mean: s = 0. In fp32
    at least, as ``mhc`` reads its streams.

    Args:
        eps: ε, added to the mean square and to the weights
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}

    def __init__(self, d_model: int, n_layers: int, layer_idx: int, n_streams: int, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.eps, last = eps, layer_idx >= n_layers - 1
        self.weight = nn.Parameter(torch.empty(n_streams, n_streams * d_model)) if last else None
        self.bias = nn.Parameter(torch.empty(n_streams)) if last else None
        self.scale = nn.Parameter(torch.empty(1)) if last else None

    def reset_parameters(self) -> None:
        if self.scale is not None and self.bias is not None:
            self.scale.zero_()
            self.bias.fill_(1 / len(self.bias) - self.eps).logit_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.scale is None:
            return x.mean(2)
        with unlowered(x):
            flat = at_least_fp32(x.flatten(2))
            drawn = full_linear(flat.flatten(0, 1), at_least_fp32(self.weight)).unflatten(0, x.shape[:2])
            drawn = drawn * (flat.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            weights = (drawn * self.scale + self.bias).sigmoid() + self.eps
            return (weights[..., None] * x).sum(2).to(x.dtype)
