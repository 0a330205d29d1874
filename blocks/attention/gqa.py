from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from blocks.attention.base import Attention, even_heads
from blocks.base import Placement
from blocks.cache import Cache
from blocks.kernels.attention import causal_attention
from blocks.position.base import Position
from registry import BlockError, register


@register("attention", "gqa")
class GQA(Attention):
    """Grouped-query attention: several query heads share one head of keys and values.

    Ainslie et al. 2023, arXiv 2305.13245: q_n = W_q,n x, k_g = W_k,g x, v_g = W_v,g x with g = ⌊n K/N⌋;
    y = W_o [softmax(q_n k_gᵀ/√H) v_g]_n. Query, key and value projections are three matrices, as in Llama's
    checkpoints; GPT-2 stores them as one. The cache keeps 2·K·H numbers a token.

    Args:
        n_heads: N, query heads
        n_kv_heads: K, heads of keys and values; divides n_heads
        head_dim: H, width of a head; null is d_model / n_heads
        bias: whether the four projections add a bias (GPT-2 does)
        position: turns queries and keys, or shifts scores
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

    def __init__(
        self,
        d_model: int,
        position: Position,
        n_heads: int = 8,
        n_kv_heads: int = 2,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        H = head_dim or even_heads(d_model, n_heads)
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            rule = f"must divide n_heads ({n_heads})"
            raise BlockError("n_kv_heads", n_kv_heads, rule, "Use 1 for one shared head, n_heads for none shared")
        self.head_dim, self.n_kv_heads = H, n_kv_heads
        self.query = nn.Linear(d_model, n_heads * H, bias=bias)
        self.key = nn.Linear(d_model, n_kv_heads * H, bias=bias)
        self.value = nn.Linear(d_model, n_kv_heads * H, bias=bias)
        self.output = nn.Linear(n_heads * H, d_model, bias=bias)
        self.position = position
        self.scale = position.softmax_scale / H**0.5

    def forward(
        self, x: Tensor, positions: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k = self.position.rotate(q, k, positions)
        k_positions = positions
        if cache is not None:
            k, v = cache.append(k, v)
            k_positions = cache.positions(x.device)
        bias = self.position.bias(positions, k_positions)
        y = causal_attention(q, k, v, scale=self.scale, bias=bias, segments=segments)
        return self.output(y.flatten(-2))

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        shape = (self.n_kv_heads, self.head_dim)
        return Cache(batch, length, {"k": shape, "v": shape}, dtype, device)

    def parallel_plan(self) -> dict[str, Placement]:
        split: dict[str, Placement] = {f"{name}.weight": "column" for name in ("query", "key", "value")}
        biases: dict[str, Placement] = {f"{name}.bias": "column" for name in ("query", "key", "value")}
        return {**split, **(biases if self.query.bias is not None else {}), "output.weight": "row"}
