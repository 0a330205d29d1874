"""FlashAttention 3 and 4, and torch's attention over documents of unequal length, where they are asked for by name.

Not run by this project so far, for want of a GPU: their calls are checked against torch's signatures alone.
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
