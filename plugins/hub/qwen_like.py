"""Rows that Qwen3-Next and Qwen3.5 share: gated delta layers, gated attention, a gated expert for every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Key, Part
from blockwright.plugins.hub.hybrid_like import DELTA, DELTA_SIZES, OURS, TYPES, delta
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    FRAME,
    GIVEN_HEADS,
    LAYER,
    PRENORM,
    QK_NORM,
    SILU,
    SIZES,
    TOP_K,
    expert_width,
    n_experts,
    n_heads,
    tied,
)
from blockwright.plugins.hub.names import Row, beside, block
from blockwright.plugins.hub.places import show

THEIRS = LAYER + "linear_attn."
TEMPLATE: dict[str, Any] = {
    "attention": {"name": "gqa", "qk_norm": {"name": "per_head"}, "output_gate": {"name": "elementwise"}},
    "norm": {"name": "rmsnorm1p"},
    "residual": {"name": "prenorm"},
    "variants": {"attention": {"linear": {"name": "gated_delta", "norm": {"name": "rmsnorm"}}}},
}
SHARED_MOE = {"name": "moe", "shared": {"name": "gated_swiglu"}}

# ---- settings --------------------------------------------------------------------------------------------------------


def _read_eps(config: Config, model: dict[str, Any]) -> None:
    model["variants"]["attention"]["linear"]["norm"]["eps"] = model["norm"]["eps"]


MIXERS = (
    Given(tuple(f"linear_{key}" for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))),
    *(*SIZES, *GIVEN_HEADS, EPS, SILU, tied(), *DELTA_SIZES, TYPES),
    Part(_read_eps, lambda decoder, config: None),
    Fixed("attention_bias", False),
)
MOE = (
    TOP_K,
    Key("moe_intermediate_size", "experts.d_ff", expert_width),
    Key("shared_expert_intermediate_size", "ffn.shared.d_ff", "sparse.ffn.shared.gate.out_features"),
    Key("num_experts", "ffn.n_experts", n_experts),
)

# ---- names -----------------------------------------------------------------------------------------------------------

SHARED = (
    *(
        Row(f"layers.{{i}}.ffn.shared.{m}.weight", f"{LAYER}mlp.shared_expert.{m}_proj.weight")
        for m in ("gate", "up", "down")
    ),
    Row("layers.{i}.ffn.shared.token_gate.weight", LAYER + "mlp.shared_expert_gate.weight"),
)
NAMES = (
    *(*FRAME, *PRENORM, *QK_NORM),
    *beside("!" + DELTA, ATTENTION[1:]),
    *beside(DELTA, delta(THEIRS, "norm", "out_proj")),
    Row(DELTA, THEIRS + "A_log"),
)


def fused(sizes: Mapping[str, int], theirs: str, suffix: str = ".weight", **layout: Any) -> tuple[Row, ...]:
    """Rows of parts of ours that are one tensor of theirs.

    Args:
        sizes: name of ours in the attention → rows of it within a group, in their order
        theirs: pattern of their name
        suffix: of our names
        layout: as in ``block``
    """
    parts = [block(tuple(sizes.values()), n, **layout) for n in range(len(sizes))]
    return tuple(Row(OURS + name + suffix, theirs, **part) for name, part in zip(sizes, parts, strict=True))


def channels(decoder: Decoder) -> dict[str, int]:
    """Rows of the queries, keys and values of a delta layer."""
    mixer: Any = show(decoder, "linear.attention")
    return {name: getattr(mixer, name).out_features for name in ("query", "key", "value")}


def convolved(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of the convolution, [q|k|v]."""
    return beside(DELTA, fused(channels(decoder), THEIRS + "conv1d.weight", "_conv.weight", taps=True))


def gated_queries(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of [q|gate] of each head of full attention."""
    heads = dict.fromkeys(("query", "output_gate.project"), show(decoder, "full.attention.head_dim"))
    return beside("!" + DELTA, fused(heads, LAYER + "self_attn.q_proj.weight", groups=n_heads(decoder)))
