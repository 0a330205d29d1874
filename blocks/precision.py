"""State that keeps its dtype when the model is cast, and products that keep theirs.

A trainer casts the whole model (``module.to(torch.bfloat16)``) and builds it under a low default dtype. Weights should
follow. Sums and counters should not: in bfloat16, 256 + 1 is 256, and a bias of 0.5 cannot change by 0.001.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeepsDtype(nn.Module):
    """A module whose own buffers keep the dtype they were registered with; casts only move them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Context in which tensors made without a dtype have this one; gives the default outside of it."""
    outside = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield outside
    finally:
        torch.set_default_dtype(outside)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Context in which fp32 matrices are multiplied in this precision of ``torch.set_float32_matmul_precision``."""
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(outside)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context without autocast on any device."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def unlowered(x: Tensor) -> torch.autocast:
    """Context without autocast on the device of x: products keep the dtype of what they multiply."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # which does not know the meta device


def full_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of fp32 [T,K] and [N,K], in full precision even on a GPU set to TF32."""
    if x.device.type != "cuda":
        return F.linear(x, weight, bias)
    y = _full_product(x, weight.t())
    return y if bias is None else y + bias


@torch.library.custom_op("blockwright::full_product", mutates_args=())
def _full_product(a: Tensor, b: Tensor) -> Tensor:
    """a b as one operator: a compiler would break its graph at the setting."""
    products = torch.backends.cuda.matmul
    precision, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        return torch.mm(a, b)
    finally:
        products.fp32_precision = precision


@_full_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _full_product(grad, b.t()), _full_product(a.t(), grad)


_full_product.register_autograd(_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
