""""""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from blockwright.blocks.attention.base import ScoreRows, check_groups, even_heads
from blockwright.blocks.attention.remembered import Memory
from blockwright.blocks.attention.scored import Changes, Scored
from blockwright.blocks.base import Drawn, Placement, number
from blockwright.blocks.convolution import Convolution, convolved
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.position.base import Position
from blockwright.blocks.qk_norm import QKNorm
from blockwright.blocks.scores import Scores
from blockwright.blocks.values import Values
from blockwright.registry import SameAs, register
from blockwright.registry.ranges import Count, Positive


@dataclass(frozen=True)
class OfHeads(Changes):
    """Those that need keys and values of heads.

    Args:
        key_conv: convolves keys over the last few tokens, before qk_norm; null for none
        value_conv: convolves values, before ``values``; null for none
        qk_norm: normalises queries and keys before rotation; null for none
        values: changes the values before they are cached; null for none
        scores: replaces the plain softmax; null for none
    """

    key_conv: Convolution | None = None
    value_conv: Convolution | None = None
    qk_norm: QKNorm | None = None
    values: Values | None = None
    scores: Scores | None = None


class GroupedAttention(Scored):
    """Grouped-query attention, full or windowed: the shared base of ``gqa``, ``mha``, ``mqa`` and ``sliding_window``.

    Args:
        n_heads: N, query heads
        n_kv_heads: K, key and value heads; divides n_heads
        window: number of last tokens a query sees, itself included; null for all
        head_dim: H, width of a head; null is d_model / n_heads
        bias: whether the query, key and value projections add a bias (GPT-2, Qwen2, gpt-oss)
        value_bias: whether the value projection does; null: as ``bias``. Huginn has none
        output_bias: whether the output projection adds one; null: as ``bias``. Qwen2 has none
        query_scale: scores are divided by its square root; null is head_dim. Gemma-2 27B has d_model / n_heads
        position: rotates queries and keys, or biases scores
    """

    projects_values: ClassVar[bool] = True  # or the keys' projection gives them too
    qk_norm: QKNorm | None
    key_conv: Convolution | None
    value_conv: Convolution | None
    values: Values | None

    def __init__(
        self,
        d_model: int,
        position: Position,
        n_heads: Count = 8,
        n_kv_heads: Count = 2,
        window: Count | None = 4096,
        head_dim: Count | None = None,
        bias: bool = False,
        value_bias: bool | None = None,
        output_bias: bool | None = None,
        query_scale: Positive | None = None,
        changes: OfHeads = OfHeads(),
    ) -> None:
        super().__init__(d_model)
        H = head_dim or even_heads(d_model, n_heads)
        check_groups(n_heads, n_kv_heads)
        self.head_dim, self.n_kv_heads, self.window = H, n_kv_heads, window
        of_values = bias if value_bias is None else value_bias
        projects = changes.makes and self.projects_values
        self.query = Linear(d_model, n_heads * H, bias=bias)
        self.key: nn.Module | None = Linear(d_model, n_kv_heads * H, bias=bias) if changes.makes else None
        self.value: nn.Module | None = Linear(d_model, n_kv_heads * H, bias=of_values) if projects else None
        self.output = Linear(changes.left(n_heads) * H, d_model, bias=bias if output_bias is None else output_bias)
        self.take(position, changes)
        self.scale = position.softmax_scale / (query_scale or H) ** 0.5

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        context, source = super().child_context(child, known), known.get("kv_source")
        if child == "qk_norm" and source is not None and not source.makes:
            return {**context, "n_kv_heads": 0}
        convolves = child in ("key_conv", "value_conv")
        return {**context, "dim": known["n_kv_heads"] * context["head_dim"]} if convolves else context

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        q = convolved(self.query_conv, self.query(x), given).unflatten(-1, (-1, self.head_dim))
        k, v = self.keys_and_values(x, q, given)
        q, k = (q, k) if self.qk_norm is None else self.qk_norm(q, k)
        q, k = given.rotated(self.position, q, k)
        return self.output(self.attend(x, given, q, {} if self.key is None else {"k": k, "v": v}).flatten(-2))

    def keys_and_values(self, x: Tensor, q: Tensor, given: Pass) -> tuple[Tensor, Tensor]:
        """Of the tokens x [B,T,D], before norms and rotation, [B,T,K,H] each; K = 0 where it borrows."""
        if self.key is None:
            return q[:, :, :0], q[:, :, :0]
        of_keys = self.key(x)
        of_values = of_keys if self.value is None else self.value(x)
        k = convolved(self.key_conv, of_keys, given).unflatten(-1, (-1, self.head_dim))
        v = convolved(self.value_conv, of_values, given).unflatten(-1, (-1, self.head_dim))
        return k, v if self.values is None else self.values(v, given.carry)

    def memory(self) -> Memory:
        return {name: [(self.n_kv_heads, self.head_dim)] for name in ("k", "v")}

    def drawn(self) -> Drawn:
        heads = self.query.out_features // self.head_dim
        shared = heads if self.key is None else self.n_kv_heads
        keys = f"{shared} of keys and values" if shared > 1 else "one of keys and values"
        window = () if self.window is None else (f"window {number(self.window)}",)
        return Drawn((f"{heads} heads of {number(self.head_dim)}", *([keys] if shared < heads else []), *window))

    def score_rows(self) -> tuple[ScoreRows, ...]:
        curved = any(conv is not None and not conv.scales for conv in (self.query_conv, self.key_conv))
        if self.qk_norm is not None or curved or not self._heads_apart():  # the norm sets their lengths
            return ()
        leaves = ("weight",) if self.query.bias is None else ("weight", "bias")
        if self.kv_source is not None or self.value is None:  # other layers or values depend on the keys' rows
            return tuple(ScoreRows(f"query.{leaf}", self.head_dim, "alone") for leaf in leaves)
        sides: tuple[Literal["query", "key"], ...] = ("query", "key")
        return tuple(ScoreRows(f"{side}.{leaf}", self.head_dim, side) for side in sides for leaf in leaves)

    def _heads_apart(self) -> bool:
        return self.scores is None or self.scores.per_head

    def head_rows(self) -> dict[str, tuple[int, ...]]:
        maps = ("query", "key", "value")
        return {f"{of}.weight": (self.head_dim,) for of in maps if getattr(self, of) is not None}

    def parallel_plan(self) -> dict[str, Placement]:
        if not self._heads_apart():
            return {}
        maps = {name: getattr(self, name) for name in ("query", "key", "value")}
        leaves = [
            f"{of}.{leaf}"
            for of, W in maps.items()
            for leaf in ("weight", "bias")
            if getattr(W, leaf, None) is not None
        ]
        return {**dict.fromkeys(leaves, "column"), "output.weight": "row"}


@register("attention", "gqa", fixes={"window": None})
class GQA(GroupedAttention):
    """Grouped-query attention: several query heads share one head of keys and values.

    Ainslie et al. 2023, arXiv 2305.13245: q_n = W_q,n x, k_g = W_k,g x, v_g = W_v,g x with g = ⌊n K/N⌋;
    y = W_o [softmax(q_n k_gᵀ/√H) v_g]_n. Query, key and value projections are three matrices, as in Llama's
    checkpoints; GPT-2 stores them as one. The cache holds 2·K·H numbers per token.
    """


@register("attention", "mha", fixes={"n_kv_heads": SameAs("n_heads")})
class MHA(GQA):
    """Multi-head attention: every head has its own queries, keys and values.

    Vaswani et al. 2017, arXiv 1706.03762: y = W_o [softmax(q_n k_nᵀ/√H) v_n]_n. It is ``gqa`` with as many KV heads as
    query heads. The cache holds 2·N·H numbers per token.
    """


@register("attention", "mqa", fixes={"n_kv_heads": 1})
class MQA(GQA):
    """Multi-query attention: all query heads share one head of keys and values.

    Shazeer 2019, arXiv 1911.02150: y = W_o [softmax(q_n kᵀ/√H) v]_n. It is ``gqa`` with one KV head. The cache holds
    2·H numbers per token.
    """

    def parallel_plan(self) -> dict[str, Placement]:
        shared = ("key.weight", "key.bias", "value.weight", "value.bias")  # one head: every rank needs it whole
        return {name: how for name, how in super().parallel_plan().items() if name not in shared}


@register("attention", "sliding_window", fixes={"selector": None})
class SlidingWindow(GroupedAttention):
    """Grouped-query attention that sees only the last ``window`` tokens.

    Beltagy et al. 2020 (Longformer), arXiv 2004.05150; Mistral 7B, arXiv 2310.06825: ``gqa`` in which token t sees
    t − window + 1 … t. Stacked layers see further: each passes on what the one below saw.

    For a model that alternates window and full attention (Gemma-2, gpt-oss), use this block everywhere with a variant
    ``{window: null}`` for the full layers. The window counts tokens of the sequence, as in transformers; in packed
    sequences it also ends at the document's start. The cache is a ring of the last ``window`` tokens.
    """

    def drawn(self) -> Drawn:
        of = super().drawn()
        return of if self.window is not None else of._replace(lines=(*(of.lines or ()), "no window"))


@register("attention", "keys_as_values", fixes={"window": None, "value_bias": None})
class KeysAsValues(GroupedAttention):
    """Grouped-query attention with one projection for keys and values.

    Gemma 4's full layers (``attention_k_eq_v``): v_g = W_k,g x, and k_g = norm(v_g), rotated; the rest is ``gqa``. The
    cache holds both, 2·K·H numbers per token, since only keys are rotated. ``grouped_tied`` rotates a part beside, and
    caches once.
    """

    projects_values: ClassVar[bool] = False
