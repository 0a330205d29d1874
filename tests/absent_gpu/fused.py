"""torch's fused attentions on a GPU that is not here: a build for CPUs would compute all scores in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias

from blockwright.blocks.kernels.attention import Called, cudnn_takes_widths
from blockwright.blocks.on_gpu import MATH, takers
from tests.absent_gpu.device import Gpu

aten = torch.ops.aten


def pretend_fused(gpu: Gpu) -> None:
    """Let ``scaled_dot_product_attention`` call the operator that torch would choose, until the process ends."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        last = isinstance(attn_mask, CausalBias)
        mask, seen = None if last else attn_mask, "last" if last else "square" if is_causal else "all"
        called = Called(q, k, v, mask, seen, scale or q.shape[-1] ** -0.5)  # type: ignore[arg-type]
        found = takers(called, gpu.capability)
        chosen = next((name for name in KERNELS if name in found), MATH)
        return KERNELS[chosen](called, dropout_p, last or is_causal)

    def cudnn_takes(params: Any, debug: bool = False) -> bool:
        widths = params.query.shape[-1], params.value.shape[-1]
        return gpu.capability[0] in (9, 10) and cudnn_takes_widths(*widths, params.query.dtype)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    torch.backends.cuda.can_use_cudnn_attention = cudnn_takes


def _flash(called: Called, dropout: float, causal: bool) -> Tensor:
    return aten._scaled_dot_product_flash_attention(*called[:3], dropout, causal, False, scale=called.scale)[0]


def _efficient(called: Called, dropout: float, causal: bool) -> Tensor:
    q, k, v, mask = called[:4]
    if mask is not None:
        mask = torch.where(mask, 0.0, -torch.inf).to(q.dtype) if mask.dtype == torch.bool else mask
        mask = mask.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, torch.is_grad_enabled(), dropout, causal, scale=called.scale
    )[0]


def _cudnn(called: Called, dropout: float, causal: bool) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(
        *called[:4], torch.is_grad_enabled(), dropout, causal, False, scale=called.scale
    )[0]


def _math(called: Called, dropout: float, causal: bool) -> Tensor:
    raise AssertionError(f"{MATH} would hold all scores of {[tuple(t.shape) for t in called[:3]]}")


KERNELS = {"flash": _flash, "efficient": _efficient, "cudnn": _cudnn, MATH: _math}  # in the order of torch
