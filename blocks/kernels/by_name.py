"""Kernels of libraries for GPUs that run where ``task.kernels`` asks for them by name, never by themselves.

FlashAttention 3 and 4, torch's attention over documents of unequal length, FlashMLA (DeepSeek-AI 2025, package
``flash_mla``: decoding over latents), the recurrences of flash-linear-attention (Yang and Zhang 2024, package
``fla-core``), and Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989; extra ``liger``).

None was run by this project so far, for want of a GPU: calls are checked against the signatures of torch and of the
libraries, and the arguments of flash-linear-attention against its plain versions of the same operations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from blockwright.blocks.kernels.attention import causal_attention
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.kernels.recurrence import Result
from blockwright.blocks.kernels.scoring import Scoring, borders, once
from blockwright.blocks.kernels.seam import kernel

HALF = (torch.bfloat16, torch.float16)


def is_plain(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether it is causal attention of half precision and nothing else."""
    return q.dtype in HALF and scoring.plain


@kernel(
    "attention",
    "fa3",
    devices=("cuda",),
    capability=(9, 0),
    needs="flash_attn_interface",
    takes=is_plain,
    automatic=False,
)
def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Shah et al. 2024, arXiv 2407.08608, through torch's own attention."""
    _activate("FA3")
    return causal_attention(q, k, v, scoring)


@kernel("attention", "fa4", devices=("cuda",), capability=(9, 0), needs="flash_attn", takes=is_plain, automatic=False)
def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """FlashAttention 4 (package flash_attn, ``cute``), through torch's own attention."""
    _activate("FA4")
    return causal_attention(q, k, v, scoring)


@cache
def _activate(name: str) -> None:
    """Put it in the place of torch's flash attention, for the whole process."""
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl(name)


def is_packed(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    """Whether it is attention within documents or a window, of half precision, with one width."""
    alone = scoring._replace(segments=None, window=None).plain
    alike = q.shape[1] == k.shape[1] and q.shape[-1] == v.shape[-1]
    return alone and alike and not scoring.plain and q.dtype in HALF and not torch.compiler.is_compiling()


@kernel("attention", "varlen", devices=("cuda",), capability=(8, 0), takes=is_packed, automatic=False)
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """FlashAttention over all documents of a batch, one after the other: no mask, and nothing computed across them."""
    from torch.nn.attention.varlen import varlen_attn

    (B, T), segments, window = q.shape[:2], scoring.segments, scoring.window
    rows = torch.zeros(B, T, dtype=torch.int64, device=q.device) if segments is None else segments
    ends = once(rows, "varlen", borders)
    y = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        ends,
        ends,
        T,
        T,
        scale=scoring.scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=k.shape[2] != q.shape[2],
    )
    assert isinstance(y, Tensor)
    return y.unflatten(0, (B, T))


LATENT, WIDTH, PAGE = 512, 576, 64  # widths of V2 and V3, and positions of a page: the library knows no others


def flash_mla_takes(
    q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None
) -> bool:
    """Whether widths, dtype and layout are the library's, and no gradient or bias is asked for."""
    fits = latent == LATENT and q.shape[-1] == WIDTH and memory.dtype == q.dtype == torch.bfloat16
    whole = memory.is_contiguous() and memory.shape[1] % PAGE == 0
    return fits and whole and bias is None and not torch.is_grad_enabled()


@kernel(
    "latent_attention",
    "flash_mla",
    devices=("cuda",),
    capability=(9, 0),
    needs="flash_mla",
    takes=flash_mla_takes,
    automatic=False,
)
def flash_mla(q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None) -> Tensor:
    """``latent_attention``: each row of the memory is a run of pages."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    B, pages = len(q), memory.shape[1] // PAGE
    table = torch.arange(B * pages, dtype=torch.int32, device=q.device).view(B, pages)
    lengths = torch.full((B,), n_keys, dtype=torch.int32, device=q.device)
    cache = memory.view(B * pages, PAGE, 1, WIDTH)
    plan, _ = get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
    y, _ = flash_mla_with_kvcache(q, cache, table, lengths, latent, plan, softmax_scale=scale, causal=True)
    return y


WIDEST = 256  # numbers of a key


def fla_takes(
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
    takes=fla_takes,
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


@kernel("cross_entropy", "liger", devices=("cuda",), needs="liger_kernel", automatic=False)
def liger_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy``. It reports z_loss · Σ log² Z, so that the sum alone is 0 without z_loss."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_index=IGNORED,
        lse_square_scale=z_loss,
        reduction="sum",
        softcap=softcap,
        return_z_loss=True,
        accum_dtype=torch.float32,
    )
    z = found.z_loss.detach() / z_loss if z_loss else torch.zeros_like(found.loss)
    return found.loss, z


@kernel("rms_norm", "liger", devices=("cuda",), needs="liger_kernel", automatic=False)
def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm``; "gemma" is Liger's word for a norm that is fp32 throughout and rounds once, as ours does."""
    from liger_kernel.transformers.functional import liger_rms_norm as norm

    return norm(x, weight, eps, offset=0.0, casting_mode="gemma", in_place=False)


@kernel("gated_silu", "liger", devices=("cuda",), needs="liger_kernel", automatic=False)
def liger_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``gated_silu``."""
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)
