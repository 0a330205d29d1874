"""FlashMLA (DeepSeek-AI 2025, package ``flash_mla``): decoding over latents, where it is asked for by name.

Not run by this project so far, for want of a GPU: its call is checked against the library's signature alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.kernels.seam import kernel

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
