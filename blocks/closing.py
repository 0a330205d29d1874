"""The contract of ``closing``: how residual streams become one after the last layer. A child of ``residual``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block, Kind
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32, full_linear, unlowered
from blockwright.registry import family, register
from blockwright.registry.ranges import Count, Positive


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


class GatedRead(nn.Module):
    """The mean of normalised streams, each channel behind a gate: x = Σ_i G_i ⊙ Z_i / M with Z_i = norm_i(X_i) and
    G = σ(W_up silu(W_down vec(Z) / M)).

    Args:
        d_model: D
        n_streams: M
        norm: of each stream; one copy for each
        rank: width of W_down vec(Z); None is an eighth of D
    """

    def __init__(self, d_model: int, n_streams: int, norm: Norm, rank: int | None) -> None:
        super().__init__()
        rank = rank or max(1, d_model // 8)
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(n_streams))
        self.down = Linear(n_streams * d_model, rank, bias=False)
        self.up = Linear(rank, n_streams * d_model, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Streams [B,T,M,D] → x [B,T,D] and vec(Z) [B,T,M·D]."""
        z = torch.cat([norm(stream) for norm, stream in zip(self.norms, x.unbind(2), strict=True)], -1)
        gates = self.up(F.silu(self.down(z) / len(self.norms))).sigmoid()
        return (gates * z).view_as(x).mean(2), z


@register("closing", "gated")
class Gated(Closing):
    """The streams as a block of ``gated_streams`` reads them, as in Qwen4-Exp, which has no norm after it.

    Args:
        norm: of each stream; one copy for each
        rank: of the gates' projection; null is d_model / 8, as in Qwen3.8-Flash-Next
    """

    def __init__(
        self, d_model: int, n_layers: int, layer_idx: int, n_streams: int, norm: Norm, rank: Count | None = None
    ) -> None:
        super().__init__()
        self.read = GatedRead(d_model, n_streams, norm, rank) if layer_idx >= n_layers - 1 else None

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"]}

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2) if self.read is None else self.read(x)[0]
