from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from blocks.attention.base import Attention, attend_in_parts, even_heads, reads_in_parts, rotated, score_terms
from blocks.attention.score_rows import ScoreRows
from blocks.attention.selecting import Losses, declared, refuse_unlearnable, remembered, selected
from blocks.base import Placement
from blocks.cache import Cache, Ring
from blocks.carry import Carry
from blocks.kernels.few_keys import attend_few
from blocks.kernels.scoring import Scoring, Slopes
from blocks.linear import Linear
from blocks.output_gate.base import OutputGate
from blocks.position.base import Position
from blocks.qk_norm.base import QKNorm
from blocks.scores.base import Scores
from blocks.selector.base import Asked, Selector
from blocks.values.base import Values
from registry import BlockError
from registry.ranges import Count, Positive


class GroupedAttention(Attention):
    """Grouped-query attention, full or windowed: the shared base of ``gqa``, ``mha``, ``mqa`` and ``sliding_window``.

    Args:
        n_heads: N, query heads
        n_kv_heads: K, key and value heads; divides n_heads
        window: number of last tokens a query sees, itself included; null for all
        head_dim: H, width of a head; null is d_model / n_heads
        bias: whether the query, key and value projections add a bias (GPT-2, Qwen2, gpt-oss)
        output_bias: whether the output projection adds one; null: as ``bias``. Qwen2 has none
        query_scale: scores are divided by its square root; null is head_dim. Gemma-2 27B has d_model / n_heads
        position: rotates queries and keys, or biases scores
        qk_norm: normalises queries and keys before rotation; null for none
        output_gate: gates the heads' outputs; null for none
        scores: replaces the plain softmax; null for none
        values: changes the values before they are cached; null for none
        selector: chooses which keys a query sees, without a window; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

    def __init__(
        self,
        d_model: int,
        position: Position,
        n_heads: Count = 8,
        n_kv_heads: Count = 2,
        window: Count | None = 4096,
        head_dim: Count | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        query_scale: Positive | None = None,
        qk_norm: QKNorm | None = None,
        output_gate: OutputGate | None = None,
        scores: Scores | None = None,
        values: Values | None = None,
        selector: Selector | None = None,
    ) -> None:
        super().__init__()
        H = head_dim or even_heads(d_model, n_heads)
        if n_heads % n_kv_heads:
            rule = f"must divide n_heads ({n_heads})"
            raise BlockError("n_kv_heads", n_kv_heads, rule, "Use 1 for one shared head, n_heads for none shared")
        refuse_unlearnable(selector, scores)
        self.head_dim, self.n_kv_heads = H, n_kv_heads
        self.window, self.selector = window, selector
        self.query = Linear(d_model, n_heads * H, bias=bias)
        self.key = Linear(d_model, n_kv_heads * H, bias=bias)
        self.value = Linear(d_model, n_kv_heads * H, bias=bias)
        self.output = Linear(n_heads * H, d_model, bias=bias if output_bias is None else output_bias)
        self.position, self.qk_norm, self.output_gate, self.scores = position, qk_norm, output_gate, scores
        self.values = values
        self.scale = position.softmax_scale / (query_scale or H) ** 0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        of_selector = {"latent_dim": known["d_model"], "attention_heads": known["n_heads"]}
        return {**super().child_context(child, known), **of_selector}

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        losses: Losses | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        v = v if self.values is None else self.values(v, {} if carry is None else carry)
        q, k = (q, k) if self.qk_norm is None else self.qk_norm(q, k)
        q, k = rotated(self.position, q, k, positions, cache)
        new = remembered(self.selector, x, positions, cache)
        if cache is not None and self.scores is None and self._in_parts(cache, q.shape[1]):
            read = partial(_keys_and_values, cache)
            y = attend_in_parts(self.position, positions, cache, q, (k, v, *new), self.scale, read)
        else:
            k, v, *slots = (k, v, *new) if cache is None else cache.append(k, v, *new)
            bias, segments = score_terms(self.position, positions, segments, cache)
            if self.selector is not None:
                asked = Asked(x, x, q, positions, declared(positions, cache))
                held = k, _as_stored, tuple(slots), segments, cache
                bias = selected(self.selector, asked, *held, bias, self.scale, losses, carry)
            attend = self.scores or self.kernels.attend
            few = None if cache is None or cache.spread else self._on_few(q, k, v, bias)
            y = attend(q, k, v, Scoring(self.scale, bias, segments, self.window)) if few is None else few
        y = y if self.output_gate is None else self.output_gate(x, y)
        return self.output(y.flatten(-2))

    def _on_few(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | Slopes | None) -> Tensor | None:
        """Attention to the keys that the selector leaves; None where they are not few."""
        if self.selector is None or self.selector.takes_all(k.shape[1]) or not isinstance(bias, Tensor):
            return None

        def attend(q: Tensor, stored: tuple[Tensor, ...], bias: Tensor) -> Tensor:
            k, v = stored
            return (self.scores or self.kernels.attend)(q, k, v, Scoring(self.scale, bias))

        return attend_few(attend, q, (k, v), bias)

    def _in_parts(self, cache: Cache, T: int) -> bool:
        dense = self.selector is None or self.selector.takes_all(cache.length + T)
        return dense and reads_in_parts(self.kernels, cache, T)

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        slots: dict[str, tuple[int, ...]] = dict.fromkeys(("k", "v"), (self.n_kv_heads, self.head_dim))
        slots |= {} if self.selector is None else self.selector.slots()
        if self.window is not None and self.window < length:
            ring = Ring(batch, self.window, slots, dtype, device, bits=bits)
            ring.declared = length
            return ring
        return Cache(batch, length, slots, dtype, device, bits=bits)

    def score_rows(self) -> tuple[ScoreRows, ...]:
        if self.qk_norm is not None:  # which sets their lengths
            return ()
        leaves = ("weight",) if self.query.bias is None else ("weight", "bias")
        sides: tuple[Literal["query", "key"], ...] = ("query", "key")
        return tuple(ScoreRows(f"{side}.{leaf}", self.head_dim, side) for side in sides for leaf in leaves)

    def parallel_plan(self) -> dict[str, Placement]:
        split: dict[str, Placement] = {f"{name}.weight": "column" for name in ("query", "key", "value")}
        biases: dict[str, Placement] = {f"{name}.bias": "column" for name in ("query", "key", "value")}
        split |= biases if self.query.bias is not None else {}
        return {**split, "output.weight": "row", **({} if self.output.bias is None else {"output.bias": "replicate"})}


def _as_stored(keys: Tensor) -> Tensor:
    return keys


def _keys_and_values(cache: Cache, tokens: slice) -> tuple[Tensor, Tensor]:
    k, v, *_ = cache.read(tokens)
    return k, v
