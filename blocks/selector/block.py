from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.selector.base import Asked, Held, Selector, highest
from blockwright.blocks.selector.documents import blocks_of
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("selector", "block")
class MoBA(Selector):
    """Mixture of block attention: each query head sees its own block and the blocks whose mean key suits it best.

    Lu et al. 2025 (MoBA), arXiv 2502.13189: with k̄_b the mean of the rotated keys of block b, query head n at token t
    sees, of the whole blocks before its own, those of the ``top_k`` − 1 highest q_tn · k̄_b, and its own block up to t.

    It has no parameters, and caches nothing: means are computed from the attention's keys; for ``mla`` from the mean
    latent, which gives the same. Blocks are counted from the start of each document.

    Args:
        block_size: tokens of a block; the paper has 512 at 8k tokens, 4096 at 1M
        top_k: blocks that a query sees, its own included
    """

    per_head = True
    conformance_settings: ClassVar[Mapping[str, Any]] = {"block_size": 3, "top_k": 2}

    def __init__(self, block_size: Count = 512, top_k: Count = 3) -> None:
        super().__init__()
        self.block_size, self.top_k = block_size, top_k

    def takes_all(self, n_keys: int) -> bool:
        return n_keys <= self.block_size * self.top_k

    @torch.no_grad()
    def forward(self, asked: Asked, held: Held) -> Tensor:
        T, blocks = asked.q.shape[1], blocks_of(held, self.block_size)
        own = blocks.own(T)
        if self.top_k == 1:
            return (own & held.seen)[:, None]
        keys = at_least_fp32(held.expand(blocks.mean(held.stored).to(held.stored.dtype)))
        queries = at_least_fp32(asked.q).unflatten(2, (keys.shape[2], -1))
        scores = torch.einsum("btkgh,bnkh->bkgtn", queries, keys).flatten(1, 2)
        possible = blocks.complete(T, own=False)[:, None]
        chosen = highest(scores.masked_fill(~possible, float("-inf")), self.top_k - 1) & possible
        return (blocks.spread(chosen) | own[:, None]) & held.seen[:, None]
