"""Norms, gates and rotations as single autograd functions, with few passes over memory.

Eager PyTorch on a CPU makes one pass and one temporary for every multiplication in a formula. These work in place
where possible, use torch's fused backward passes, and save only what is expensive to recompute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import as_written, kernel
from blockwright.registry import BlockError


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


# --- rotation of pairs of dimensions, shared by every rotary position block ---


Angles = tuple[Tensor, Tensor]
Rotate = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def rotary_width(head_dim: int, fraction: float) -> int:
    """How many of ``head_dim`` dimensions are rotated.

    Raises:
        BlockError: the fraction is outside (0, 1], or the width is odd
    """
    if not 0 < fraction <= 1:
        raise BlockError("rotary_fraction", fraction, "must lie in (0, 1]", "Use 1.0 to rotate the whole head")
    width = int(head_dim * fraction)
    if width < 2 or width % 2:
        rule = f"rotates pairs of dimensions, but {width} of the head's {head_dim} would be rotated"
        raise BlockError("rotary_fraction", fraction, rule, "Choose heads of even width, or a fraction that gives one")
    return width


@kernel("rotation", "fused", takes=as_written, automatic=("cpu",), order=10)
def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R dimensions of every head.

    Args:
        x: [B,T,N,H]
        cos, sin: [B|1,T,R/2] fp32, the angle of each pair at each position, possibly scaled
        interleaved: pairs are (2j, 2j+1) and stay in place, else (j, j+R/2)

    Returns:
        [B,T,N,H] in the dtype of x; computed in fp32 (fp64 for fp64 input)
    """
    return _Rotation.apply(x, cos, sin, interleaved) if torch.is_grad_enabled() else _rotated(x, cos, sin, interleaved)


@kernel("rotation", "torch", order=20)
def rotate_pairs_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``rotate_pairs`` in plain operations, which a compiler fuses."""
    width = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    turning, passing = x[..., :width].to(wide), x[..., width:]
    cos, sin = cos[:, :, None].to(wide), sin[:, :, None].to(wide)
    if interleaved:
        a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    turned = turned.to(x.dtype)
    return torch.cat((turned, passing), -1) if passing.shape[-1] else turned


class _Rotation(torch.autograd.Function):
    """A rotation's adjoint is the opposite rotation, so ``x`` is not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin, ctx.interleaved), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide, width = torch.promote_types(x.dtype, torch.float32), 2 * cos.shape[-1]
    cos, sin = cos[:, :, None].to(wide), sin[:, :, None].to(wide)
    y, turning = x.new_empty(x.shape), x[..., :width].to(cos.dtype)
    if interleaved:  # pairs in memory are complex numbers
        pairs = torch.view_as_complex(turning.unflatten(-1, (-1, 2)).contiguous())
        y[..., :width] = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        out = y[..., :width].chunk(2, -1) if y.dtype == cos.dtype else turning.new_empty(turning.shape).chunk(2, -1)
        torch.mul(a, cos, out=out[0]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[1]).addcmul_(a, sin)
        if y.dtype != cos.dtype:
            y[..., : width // 2], y[..., width // 2 : width] = out
    if width < x.shape[-1]:
        y[..., width:] = x[..., width:]
    return y


def angles(positions: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> Angles:
    """Cosines and sines of position · frequency, [B|1,T,R/2] fp32.

    Args:
        positions: [B|1,T]
        frequencies: [R/2] fp32, radians per position
        amplitude: factor on the rotated dimensions
    """
    by = positions[..., None].float() * frequencies
    cos, sin = by.cos(), by.sin()
    return (cos, sin) if amplitude == 1.0 else (cos * amplitude, sin * amplitude)


def turn(
    q: Tensor, k: Tensor, angles: Angles, interleaved: bool, rotate: Rotate = rotate_pairs
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys.

    Args:
        q, k: [B,T,·,H]
        angles: ``angles`` of their positions
        interleaved: as in ``rotate_pairs``
        rotate: an implementation of ``rotate_pairs``
    """
    cos, sin = angles
    if q.shape[1] == 1 and not torch.is_grad_enabled():  # decoding: launching operators costs more than a small copy
        both = rotate(torch.cat((q, k), 2), cos, sin, interleaved)
        q, k = both.split((q.shape[2], k.shape[2]), 2)
        return q, k
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def base_frequencies(theta: float, rotary_dim: int, device: torch.device) -> Tensor:
    """theta^(−2j/R) for the pairs j of R/2, [R/2] fp32."""
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    return theta**-exponents
