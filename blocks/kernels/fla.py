"""Recurrences by flash-linear-attention (Yang and Zhang 2024, package ``fla-core``), where they are asked for by name.

Not run by this project so far, for want of a GPU: its calls are checked against the library's signatures, and its
arguments against the library's plain versions of the same operations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from blockwright.blocks.kernels.recurrence import Result
from blockwright.blocks.kernels.scoring import borders, once
from blockwright.blocks.kernels.seam import kernel

WIDEST = 256  # numbers of a key
HALF = (torch.bfloat16, torch.float16)


def takes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
) -> bool:
    """Whether the library has the operation, and its products may be rounded: in half precision, or in fp32 where
    ``callbacks.machine.float32_matmul`` allows TF32."""
    known = erase is None and (beta is not None or decay.shape[-1] == 1)  # other operations of it are not called yet
    rounded = v.dtype in HALF or (v.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")
    return known and rounded and k.shape[-1] <= WIDEST and not torch.compiler.is_compiling()


# GPUs, by the first number of their capability; a package, from a version and below another; what it does there, and
# the issue of flash-linear-attention that says so.
UNSOUND = (
    ((9,), "triton", "3.4", "3.7.1", "computes wrong gradients of gates", 640),
    ((10, 12), "triton", "0", "3.6", "does not compile the backward pass", 638),
    ((10, 12), "fla-core", "0", "0.6", "hangs in long backward passes", 1000),
)


def unsound(capability: tuple[int, int]) -> str | None:
    """Why the versions that are installed are wrong on a GPU; None if nothing is known against them."""
    for gpus, package, first, below, what, issue in UNSOUND:
        here = _version(package)
        if capability[0] in gpus and here is not None and first <= here < below:
            return f"{package} {here} {what} on this GPU (flash-linear-attention#{issue}); {below} is fixed"
    return None


def _version(package: str) -> TorchVersion | None:
    try:
        return TorchVersion(version(package))
    except PackageNotFoundError:
        return None


@kernel(
    "recurrence",
    "fla",
    devices=("cuda",),
    capability=(8, 0),
    needs="fla",
    takes=takes,
    automatic=False,
    order=30,
    unsound=unsound,
)
def fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    erase: Tensor | None = None,
    at: Tensor | None = None,
) -> Result:
    """``recurrence``: the gated delta rule, Kimi Delta Attention, or the plain one with a decay by head. ``takes``
    leaves out ``erase`` and ``at``."""
    by_head = decay.shape[-1] == 1
    given = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "g": decay[..., 0] if by_head else decay}
    given |= {} if beta is None else {"beta": beta}
    T = v.shape[1]
    name = "simple_gla" if beta is None else "gated_delta_rule" if by_head else "kda"
    operation = _operation(name, "fused_recurrent" if T == 1 and not torch.is_grad_enabled() else "chunk")
    if segments is None or T == 1:
        y, last = operation(**given, scale=1.0, initial_state=state, output_final_state=True)
        return y.to(v.dtype), last
    return _by_documents(operation, given, state, segments)


def _operation(name: str, form: str) -> Callable[..., Result]:
    return getattr(importlib.import_module(f"fla.ops.{name}"), f"{form}_{name}")


def _by_documents(operation: Any, given: dict[str, Tensor], state: Tensor | None, segments: Tensor) -> Result:
    """All documents of a batch one after the other; the first of each row continues its state."""
    ends, first, last = once(segments, "fla", _documents)
    if state is not None:
        state = state.new_zeros(len(ends) - 1, *state.shape[1:]).index_copy(0, first, state)
    flat = {name: t.flatten(0, 1)[None] for name, t in given.items()}
    y, states = operation(**flat, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=ends)
    return y[0].unflatten(0, segments.shape).to(given["v"].dtype), states[last]


def _documents(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Borders of the documents, and which document is the first and which the last of each row, [B]."""
    ends = borders(segments).long()
    rows = torch.arange(len(segments) + 1, device=segments.device) * segments.shape[1]
    begins = torch.searchsorted(ends, rows)
    return ends, begins[:-1], begins[1:] - 1
