"""The contract of ``norm``: normalise activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.linear import Linear
from blockwright.registry import family, register
from blockwright.registry.ranges import Count, Positive


@family("norm", context=("dim",))
class Norm(Block):
    """Normalises the last dimension, of width ``dim``, which the norm's owner supplies."""

    counted_as: ClassVar[str | None] = "norms"

    def drawn(self) -> Drawn:
        return Drawn(hides=("eps",))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] → [..., dim], same dtype."""
        raise NotImplementedError


@register("norm", "divided")
class Divided(Norm):
    """Another norm, whose result is divided by a number: as the model's last norm it sets how large logits are.

    Yang et al. 2022 (µP), arXiv 2203.03466, whose output multiplier is 1/width; Inkling divides by 24. Norms look for
    their kind outward: where the model's is this one, others are named (``residual.attention_norm``, …).

    Args:
        norm: the other norm; ``rmsnorm`` if none is named
        by: the divisor
    """

    default_children: ClassVar[Mapping[str, Any]] = {"norm": {"name": "rmsnorm"}}

    def __init__(self, norm: Norm, by: Positive = 1.0) -> None:
        super().__init__()
        self.norm, self.by = norm, by

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) / self.by


@register("norm", "dynamic_tanh")
class DynamicTanh(Norm):
    """A learned tanh in place of a norm: no statistics of the token.

    Zhu et al. 2025 (DyT), arXiv 2503.10622: y = γ ⊙ tanh(α x) + β, one α, at the start γ = 1, β = 0.

    Args:
        alpha: α at the start; the paper takes 0.2 to 1, less for wider models
    """

    def __init__(self, dim: int, alpha: Positive = 0.5) -> None:
        super().__init__()
        self.start = alpha
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        self.alpha.fill_(self.start)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, torch.tanh(self.alpha * x))


@register("norm", "rmsnorm")
class RMSNorm(Norm):
    """Root-mean-square norm with a learned gain, no centring.

    Zhang & Sennrich 2019, arXiv 1910.07467: y = x / sqrt(mean(x²) + eps) · g.

    In low precision the mean is taken in fp32 and the gain applied before rounding back, as torch and DeepSeek's
    inference code do; transformers' Llama rounds first, a difference of one unit in the last place of bf16.

    Args:
        eps: added to the mean square; 1e-6 in DeepSeek, 1e-5 in Llama-2
    """

    def __init__(self, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.normalise(x, self.weight, self.eps)


@register("norm", "gated")
class Gated(RMSNorm):
    """A root-mean-square norm gated by its own result, through a projection of low rank.

    A.X-K2: n = x / sqrt(mean(x²) + eps) · g; y = n ⊙ σ(W_up silu(W_down n)).

    Args:
        eps: added to the mean square
        rank: width of W_down n; 16 in A.X-K2
    """

    def __init__(self, dim: int, eps: Positive = 1e-6, rank: Count = 16) -> None:
        super().__init__(dim, eps)
        self.down, self.up = Linear(dim, rank, bias=False), Linear(rank, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.up(F.silu(self.down(y))).sigmoid()


@register("norm", "layernorm")
class LayerNorm(Norm):
    """Layer norm: centre, scale to unit variance, learned gain and shift.

    Ba et al. 2016, arXiv 1607.06450: y = (x − mean) / sqrt(var + eps) · g + b.

    Args:
        eps: added to the variance; 1e-5 in GPT-2
        bias: whether the shift b is learned; published decoders from PaLM on leave it out
    """

    def __init__(self, dim: int, eps: Positive = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@register("norm", "none")
class NoNorm(Norm):
    """No normalisation: y = x.

    Transformers train without some of them: He & Hofmann 2024, arXiv 2311.01906. As ``kv_norm`` of ``mla`` it keeps
    keys and values linear in x, as those of an attention that is turned into a latent one are.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


@register("norm", "rmsnorm1p")
class RMSNorm1p(Norm):
    """Root-mean-square norm whose learned gain is stored as its difference from one.

    Gemma, arXiv 2403.08295: y = x / sqrt(mean(x²) + eps) · (1 + g), g initially 0, so that weight decay pulls the gain
    to 1 and not to 0. In low precision all of it is computed in fp32 and rounded once, as in Gemma.

    Args:
        eps: added to the mean square; 1e-6 in Gemma
    """

    def __init__(self, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        self.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed * (1 + self.weight.to(wide.dtype))).to(x.dtype)


@register("norm", "scale_corrected")
class ScaleCorrected(RMSNorm):
    """A root-mean-square norm of a latent, as long as that of the model's width.

    LongCat-Flash, arXiv 2509.01322 (scale-correction factors): y = √(d_model / dim) · x / sqrt(mean(x²) + eps) · g.
    What is made of a latent then has the variance that it would have if it were made of the model's states, whatever
    the latent's width. Of width d_model it is ``rmsnorm``.

    Args:
        eps: added to the mean square
    """

    def __init__(self, d_model: int, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__(dim, eps)
        self.factor = (d_model / dim) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@register("norm", "unit_rms")
class UnitRMS(Norm):
    """Root-mean-square norm without a gain: y = x / sqrt(mean(x²) + eps).

    DeepSeek-V4's queries; nanochat's every norm. In low precision the mean is taken in fp32.

    Args:
        eps: added to the mean square
    """

    def __init__(self, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps)
