"""A count of floating-point operations while tensors are computed, forward and backward.

As torch's counter, by torch's own formulas, with those of operators that it does not know: products added in place,
grouped products, and attention on a CPU, whose FLOPs it leaves out of a training step. A multiplication and an addition
are two; elementwise operations and sums are none. What an operator computes again for its gradient is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _added_product(_: Tensor, left: Tensor, right: Tensor, *more: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _grouped_product(rows: Tensor, weight: Tensor, *more: Any) -> int:
    """For either grouped operand: [M,K] × [E,K,N], or [N,M] × [M,K] → [E,N,K]."""
    return 2 * rows.numel() * weight.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> int:
    """[B,N,T,H] on [B,N|K,S,H] and [B,N|K,S,V]; not halved for causality."""
    return 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> int:
    return 2 * _attention(q, k, v)


_aten = torch.ops.aten
_OTHERS: dict[Any, Callable[..., int]] = {
    _aten.addmm_: _added_product,
    _aten.baddbmm_: _added_product,
    _aten._grouped_mm: _grouped_product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counter(TorchDispatchMode):
    """Counts what is computed while it is entered: ``total``, of products of matrices, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # imports triton, which refusals have no time for

        self.known, self.total = flop_registry, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, operator = kwargs or {}, func._overloadpacket
        if operator in _OTHERS:
            self.total += _OTHERS[operator](*args)
        elif operator not in self.known:
            with self:
                parts = func.decompose(*args, **given)
            return func(*args, **given) if parts is NotImplemented else parts
        out = func(*args, **given)
        if operator in self.known and operator not in _OTHERS:
            self.total += self.known[operator](*args, **given, out_val=out)
        return out


def forward_flops(run: Callable[[], Any]) -> int:
    """FLOPs of what a function computes."""
    with torch.no_grad(), Counter() as counter:
        run()
    return counter.total


def trained_flops(run: Callable[[], Any], part: nn.Module) -> int:
    """FLOPs of what a function computes, and of the gradients of a module's parameters and of all that it reads.

    Args:
        run: gives what has gradients, on the meta device
        part: is left without gradients
    """
    with torch.enable_grad(), Counter() as counter:
        found = [t for t in tree_leaves(run()) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(found, [torch.empty_like(t) for t in found])
    part.zero_grad()
    return counter.total
