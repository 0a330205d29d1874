"""Norms and gates as single autograd functions, with few passes over memory.

Eager PyTorch on a CPU makes one pass and one temporary for every multiplication in a formula. These work in place
where possible, use torch's fused backward passes, and save only what is expensive to recompute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import as_written, kernel


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised x, and 1 / sqrt(mean(x²) + eps)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(wide, inverse).mul_(weight).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # torch's fused layer norm backward with mean 0 is that of this norm, except that it subtracts the mean of the
        # incoming gradient, which is added back here.
        x, weight, inverse = ctx.saved_tensors
        wide = weight.to(inverse.dtype)
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(inverse), inverse, wide, None, [True, True, False]
        )
        mean = F.linear(grad, weight[None].to(grad.dtype)).to(inverse.dtype).mul_(inverse).div_(x.shape[-1])
        return grad_x.add_(mean), grad_weight.to(weight.dtype), None


@kernel("rms_norm", "fused", takes=as_written, automatic=("cpu",), order=10)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; computed in fp32 (fp64 for fp64), rounded once.

    Args:
        x: [..., D]
        weight: [D]
        eps: added to the mean square
    """
    # Without gradients, the autograd function's overhead equals its arithmetic for the one token of a decoding step.
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normalised(x, weight, eps)[0]


@kernel("rms_norm", "torch", order=20)
def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` by torch's operator, fused on a GPU and by the compiler."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)  # mixed dtypes have no fused kernel


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` as in the formula."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


@kernel("gated_silu", "fused", takes=as_written, automatic=("cpu",), order=10)
def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up, both [..., F]: the hidden layer of SwiGLU, saving only the two inputs."""
    return _GatedSiLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


@kernel("gated_silu", "torch", order=20)
def gated_silu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``gated_silu`` in plain operations, which a compiler fuses."""
    return F.silu(gate) * up
