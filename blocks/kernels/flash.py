"""What is asked for by name: FlashAttention 3 and 4, torch's attention over documents of unequal length, and FlashMLA.

FlashMLA (DeepSeek-AI 2025, package ``flash_mla``) decodes over latents. None was run by this project so far, for want
of a GPU: calls are checked against the signatures of torch and of the library alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from blockwright.blocks.kernels.attention import causal_attention
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


def takes(q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None) -> bool:
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
    takes=takes,
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
