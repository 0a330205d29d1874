"""Qwen3-Next and Qwen3.5: gated delta layers, gated attention, a gated expert for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Key, Part, Setting, Unused, show
from blockwright.plugins.hub.family import Family, language_of
from blockwright.plugins.hub.hybrid_like import DELTA, DELTA_SIZES, OURS, TYPES, delta
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EXPERTS,
    FRAME,
    GATED_FFN,
    GIVEN_HEADS,
    LAYER,
    MIXTURE,
    PRENORM,
    QK_NORM,
    RENORMALISE,
    ROUTER,
    SILU,
    SIZES,
    TOP_K,
    WIDTH,
    expert_width,
    n_experts,
    n_heads,
    tied,
)
from blockwright.plugins.hub.names import Row, beside, block
from blockwright.plugins.hub.rope import rope

# Rows that Qwen3-Next and Qwen3.5 share: gated delta layers, gated attention, a gated expert for every token.
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


# Qwen3-Next: gated delta layers and gated attention, both with fused projections; routed experts beside a gated one.
#
# In memory projections are apart, so that heads can be split over ranks. The head of multi-token prediction is left
# out, as in transformers.


def _fused_next(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of fused projections, [q|k|v|z] and [β|decay] of each key head."""
    mixer = show(decoder, "linear.attention")
    K, V = mixer.head_dim, mixer.v_head_dim
    groups, values = mixer.query.out_features // K, mixer.shared_by * V
    widths = {"query": K, "key": K, "value": values, "output_gate.project": values}
    scalars = dict.fromkeys(("strength", "decay.project"), mixer.shared_by)
    return (
        *beside(DELTA, fused(widths, THEIRS + "in_proj_qkvz.weight", groups=groups)),
        *beside(DELTA, fused(scalars, THEIRS + "in_proj_ba.weight", groups=groups)),
        *convolved(decoder),
        *gated_queries(decoder),
    )


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    template={**MIXTURE, **TEMPLATE, "ffn": SHARED_MOE},
    settings=(
        Given(("norm_topk_prob",)),
        *(*MIXERS, rope("half_split", fraction=0.25), *MOE, RENORMALISE),
        Fixed("decoder_sparse_step", 1),
        Fixed("mlp_only_layers", []),
        Fixed("use_sliding_window", False, written=False),
        Unused("intermediate_size"),
    ),
    names=(*NAMES, *ROUTER, *EXPERTS, *SHARED),
    left_out=(r"mtp\..*",),
    sized=_fused_next,
)


# The language models of Qwen3.5 and 3.6: Qwen3-Next's blocks, with projections apart, dense or with routed experts.
#
# The released files hold a vision tower too, under ``qwen3_5`` or ``qwen3_5_moe``: from those the language model is
# read, and the tower is left out, as is the head of multi-token prediction. What is written is the language model,
# under ``qwen3_5_text`` or ``qwen3_5_moe_text``. The three rotations of a place in an image are one for text.


def _fused(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of fused projections, [q|k|v]."""
    projected = beside(DELTA, fused(channels(decoder), THEIRS + "in_proj_qkv.weight"))
    return (*projected, *convolved(decoder), *gated_queries(decoder))


SETTINGS: tuple[Setting, ...] = (
    *MIXERS,
    rope("half_split", fraction=0.25, idle=("mrope_section", "mrope_interleaved")),
    Fixed("attn_output_gate", True, written=False),
    Fixed("output_gate_type", "swish", written=False),  # of the delta layers
    *(Unused(key) for key in ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")),
)
APART = tuple(
    Row(f"{OURS}{ours}.weight", f"{THEIRS}in_proj_{theirs}.weight")
    for ours, theirs in (("output_gate.project", "z"), ("strength", "b"), ("decay.project", "a"))
)

QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    template={**TEMPLATE, "ffn": {"name": "swiglu"}},
    settings=(*SETTINGS, WIDTH),
    names=(*NAMES, *beside(DELTA, APART), *GATED_FFN),
    left_out=(r"mtp\..*",),
    sized=_fused,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    template={**MIXTURE, **TEMPLATE, "ffn": SHARED_MOE, "gating": {"name": "softmax_topk", "renormalise": True}},
    settings=(
        *SETTINGS,
        *MOE,
        Fixed("norm_topk_prob", True, written=False),
        Fixed("mlp_only_layers", [], written=False),
    ),
    names=(*NAMES, *beside(DELTA, APART), *ROUTER, *EXPERTS, *SHARED),
)
WITH_VISION = tuple(
    language_of(
        family,
        model_type=family.model_type.removesuffix("_text"),
        places=("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_config"),
        left_out=(r"model\.visual\..*", r"mtp\..*"),
    )
    for family in (QWEN3_5, QWEN3_5_MOE)
)
