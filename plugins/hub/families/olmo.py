"""OLMo 2, its mixture of experts OLMoE, and OLMo Hybrid."""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Unused, refusal, show
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.hybrid_like import DELTA, DELTA_SIZES, OURS, TYPES, VARIANT, apart, delta
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EVEN_HEADS,
    EXPERTS,
    FRAME,
    GATED_FFN,
    HEADS,
    LAYER,
    MIXTURE,
    PRENORM,
    QK_NORM,
    RENORMALISE,
    ROUTER,
    SILU,
    SIZES,
    TEMPLATE,
    TOP_K,
    WIDTH,
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.names import Row, beside
from blockwright.plugins.hub.rope import rope

# OLMo 2: norms after the mixers, and one over all queries and one over all keys.
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    template={
        **TEMPLATE,
        "attention": {"name": "gqa", "qk_norm": {"name": "full"}},
        "residual": {"name": "reordered"},
    },
    settings=(
        *(*SIZES, *EVEN_HEADS, WIDTH, EPS, SILU, tied(), rope("half_split")),
        Fixed("attention_bias", False),
    ),
    names=(
        *FRAME,
        Row("layers.{i}.residual.attention_norm.weight", LAYER + "post_attention_layernorm.weight"),
        Row("layers.{i}.residual.ffn_norm.weight", LAYER + "post_feedforward_layernorm.weight"),
        *(*ATTENTION, *QK_NORM, *GATED_FFN),
    ),
)


# OLMoE: routed experts in every layer; one norm over all queries, one over all keys.
OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    template={**MIXTURE, "attention": {"name": "gqa", "qk_norm": {"name": "full"}}},
    settings=(
        *(*SIZES, *HEADS[:2], Unused("head_dim"), EPS, SILU, tied(), rope("half_split"), TOP_K, RENORMALISE),
        Key("intermediate_size", "experts.d_ff", expert_width),
        Key("num_experts", "ffn.n_experts", n_experts),
        Fixed("attention_bias", False),
        Fixed("clip_qkv", None),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *QK_NORM, *ROUTER, *EXPERTS),
)


# OLMo-Hybrid: gated delta layers normed before, attention normed after, with or without positions.
#
# transformers 5.24 saves checkpoints of this family with convolutions cut into three equal parts: where heads of values
# are wider than those of keys, such a folder is refused, and the released one is read.
THEIRS = LAYER + "linear_attn."
ROPE = rope("half_split")


def _read_positions(config: Config, model: dict[str, Any]) -> None:
    """Rotary positions where rope_theta is a number, none where it is null."""
    given = config.values.get("rope_parameters")
    if not isinstance(given, dict) or "rope_theta" not in given:
        rule = "must say rope_theta: a number, or null for a model without positions as released"
        raise refusal("rope_parameters", given, rule, 'Write {"rope_theta": null, "rope_type": "default"} or a number')
    if given["rope_theta"] is not None:
        return ROPE.read(config, model)
    config.taken |= {"rope_parameters", "rope_theta", "rope_scaling"}
    model["position"] = "none"


def _write_positions(decoder: Decoder, config: dict[str, Any]) -> None:
    if hasattr(show(decoder, "full.attention.position"), "frequencies"):
        return ROPE.write(decoder, config)
    config["rope_parameters"] = {"rope_theta": None, "rope_type": "default"}


def _read_norms(config: Config, model: dict[str, Any]) -> None:
    mixers = model["layout"]["attention"]
    model["layout"]["residual"] = ["residual" if mixer == "linear" else "after" for mixer in mixers]


OLMO_HYBRID = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    template={
        **TEMPLATE,
        "attention": {"name": "gqa", "qk_norm": {"name": "full"}},
        "variants": {
            "attention": {"linear": {"name": "gated_delta", "norm": {"name": "rmsnorm", "eps": 1e-5}}},
            "residual": {"after": {"name": "reordered"}},
        },
    },
    settings=(
        *(*SIZES, *EVEN_HEADS, EPS, SILU, tied(), *DELTA_SIZES, TYPES),
        Part(_read_norms, lambda decoder, config: None),
        Part(_read_positions, _write_positions),
        Key("intermediate_size", "ffn.d_ff", "first.ffn.gate.out_features"),
        Key(
            "linear_allow_neg_eigval",
            VARIANT + "negative_eigenvalues",
            lambda decoder: show(decoder, "linear.attention.reach") == 2.0,
            bool,
            True,
        ),
        Fixed("attention_bias", False),
        *(
            Unused(f"linear_{key}") for key in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")
        ),  # at start
    ),
    names=(
        *(*FRAME, *QK_NORM, *GATED_FFN),
        *beside(
            "!" + DELTA,
            (
                *ATTENTION,
                Row(
                    "layers.{i}.residual.attention_norm.weight",
                    LAYER + "post_attention_layernorm.weight",
                    also=LAYER + "feedforward_layer_norm.weight",  # as transformers saves it
                ),
                Row("layers.{i}.residual.ffn_norm.weight", LAYER + "post_feedforward_layernorm.weight"),
            ),
        ),
        *beside(
            DELTA,
            (
                *(*delta(THEIRS, "o_norm", "o_proj"), *apart(THEIRS)),
                Row(OURS + "decay.project.weight", THEIRS + "a_proj.weight"),
                Row(OURS + "strength.weight", THEIRS + "b_proj.weight"),
                Row(OURS + "output_gate.project.weight", THEIRS + "g_proj.weight"),
                Row("layers.{i}.residual.attention_norm.weight", LAYER + "attention_layer_norm.weight"),
                Row("layers.{i}.residual.ffn_norm.weight", LAYER + "feedforward_layer_norm.weight"),
            ),
        ),
        Row(DELTA, THEIRS + "A_log"),
    ),
)
