"""Ling 3.0: KDA of full-rank projections and bounded decay, latent attention with a gate for each head.

The experts are DeepSeek-V3's. The head of multi-token prediction is left out. Ling 2.5 and 2.6 have the same model_type
and other blocks, of lightning attention; their keys are refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Setting, Unused, refusal, show
from blockwright.plugins.hub.deepseek_like import (
    CHOICE_BIAS,
    LATENT,
    LATENT_SIZES,
    SHARED,
    TEMPLATE,
    WITHOUT_PREDICTION,
)
from blockwright.plugins.hub.families.kimi_linear import GATING, read_layers, write_layers
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.hybrid_like import DELTA, LINEAR, OURS, apart, delta, read_mixers, taps, types
from blockwright.plugins.hub.llama_like import (
    EPS,
    EXPERTS,
    FRAME,
    FULL,
    GATED_FFN,
    LAYER,
    PRENORM,
    ROUTER,
    SILU,
    SIZES,
    expert_width,
    n_experts,
    read_types,
    tied,
)
from blockwright.plugins.hub.names import Row, beside
from blockwright.plugins.hub.rope import rope

THEIRS = LAYER + "attention."

# ---- settings --------------------------------------------------------------------------------------------------------


def _read_types(config: Config, model: dict[str, Any]) -> None:
    every, depth = config.take("layer_group_size", kind=int), model["n_layers"]
    if config.values.get("layer_types") is None and (every < 1 or depth % every):
        rule = f"must divide the {depth} layers: of a group that is cut short, released code and transformers differ"
        raise refusal("layer_group_size", every, rule, "Write layer_types")
    read_mixers(read_types(config, model, (FULL, LINEAR), lambda i: LINEAR if (i + 1) % every else FULL), model)


def _write_types(decoder: Decoder, config: dict[str, Any]) -> None:
    kinds = types(decoder)
    config |= {"layer_types": kinds, "layer_group_size": kinds.index(FULL) + 1}


def _read_widths(config: Config, model: dict[str, Any]) -> None:
    """Heads of the linear layers: as released, or in the keys that transformers derives from those and writes too."""
    variant, norm = model["variants"]["attention"]["linear"], model["norm"]
    given = {key: config.take(key, kind=int, default=None) for key in ("linear_num_heads", "linear_head_dim")}
    variant["n_heads"] = given["linear_num_heads"] or config.take("num_attention_heads", kind=int)
    variant["head_dim"] = given["linear_head_dim"] or config.take("head_dim", kind=int)
    variant["taps"] = config.take("short_conv_kernel_size", "linear_conv_kernel_dim", kind=int)
    variant["norm"] = {"name": "rmsnorm", "eps": norm["eps"]}


def _write_widths(decoder: Decoder, config: dict[str, Any]) -> None:
    mixer: Any = show(decoder, "linear.attention")
    heads = mixer.value.out_features // mixer.v_head_dim
    config |= {"head_dim": mixer.head_dim, "linear_head_dim": mixer.head_dim, "linear_num_heads": heads}
    config |= {"short_conv_kernel_size": taps(decoder), "linear_conv_kernel_dim": taps(decoder)}


def _read_bound(config: Config, model: dict[str, Any]) -> None:
    bounded = config.take("kda_safe_gate", kind=bool)
    lowest = config.take("kda_lower_bound", default=-5.0)
    if not isinstance(lowest, int | float) or not lowest < 0:
        raise refusal("kda_lower_bound", lowest, "must be a negative number", "Write -5.0")
    model["variants"]["attention"]["linear"]["decay"]["most"] = -lowest if bounded else None


def _write_bound(decoder: Decoder, config: dict[str, Any]) -> None:
    most = show(decoder, "linear.attention.decay.most")
    config |= {"kda_safe_gate": most is not None, "kda_lower_bound": -5.0 if most is None else -most}


GATE: tuple[Setting, ...] = (
    Key("num_experts_per_token", "gating.top_k", GATING + "top_k", also=("num_experts_per_tok",)),
    Key("moe_renormalize", "gating.renormalise", GATING + "renormalise", bool, also=("norm_topk_prob",)),
    Key("routed_scaling_factor", "gating.scaling", GATING + "scaling", float),
    Key("num_expert_group", "gating.n_groups", GATING + "n_groups", also=("n_group",)),
    Key("topk_group", "gating.top_groups", GATING + "top_groups"),
    *(Fixed(key, "sigmoid", written=False) for key in ("score_function", "scoring_func")),
    Fixed("topk_method", "noaux_tc", written=False),
    Fixed("moe_router_enable_expert_bias", True, written=False),
    Fixed("router_dtype", "fp32", written=False),
)
OF_OTHERS = """n_routed_experts partial_rotary_factor rotary_dim num_nextn_predict_layers num_mtp_layers
    mtp_loss_scaling_factor mtp_use_kda use_qk_norm moe_shared_expert_intermediate_size"""

# ---- names -----------------------------------------------------------------------------------------------------------


def _renamed(row: Row) -> Row:
    theirs = row.theirs.replace(".self_attn.", ".attention.").replace(".o_proj.", ".dense.")
    return replace(row, theirs=theirs)


GATES = "output_gate.project.weight"
KDA = (
    *(*delta(THEIRS, "o_norm", "dense"), *apart(THEIRS)),
    Row(DELTA, THEIRS + "A_log"),
    Row(OURS + "strength.weight", THEIRS + "b_proj.weight"),
    Row(OURS + "decay.matrix.weight", THEIRS + "f_proj.weight"),
)

BAILING_HYBRID = Family(
    model_type="bailing_hybrid",
    architecture="BailingHybridForCausalLM",
    template={
        **TEMPLATE,
        "attention": {**TEMPLATE["attention"], "output_gate": {"name": "per_head"}},
        "gating": {"name": "sigmoid_bias"},
        "variants": {
            "attention": {
                "linear": {"name": "kda", "decay": {"name": "full_rank"}, "output_gate": {"name": "elementwise"}}
            }
        },
    },
    settings=(
        *(*SIZES[:3], EPS, SILU, tied(), *LATENT_SIZES),
        Key("model_max_length", "max_positions", SIZES[3].shown, also=("max_position_embeddings",)),
        rope("interleaved", sharpened=True, theta=6_000_000.0, idle=("partial_rotary_factor",)),
        Key("moe_intermediate_size", "experts.d_ff", expert_width),
        Key("num_experts", "ffn.n_experts", n_experts, also=("num_local_experts",)),
        Part(read_layers, write_layers),
        Part(_read_types, _write_types),
        Part(_read_widths, _write_widths),
        Part(_read_bound, _write_bound),
        *GATE,
        Fixed("no_kda_lora", True, written=False),
        Fixed("use_mla_nope", False, written=False),
        Fixed("gated_attention_proj_granularity_type", "head_wise", written=False),
        *(Fixed(key, False, written=False) for key in ("use_bias", "use_qkv_bias")),
        Fixed("rope_interleave", True, written=False),
        *(Unused(key) for key in OF_OTHERS.split()),
    ),
    names=(
        Row("embedding.weight", "model.word_embeddings.weight"),
        *FRAME[1:],
        *(*PRENORM, *GATED_FFN, *ROUTER, *EXPERTS, *SHARED, CHOICE_BIAS[1]),
        Row("layers.{i}.ffn.gating.bias", LAYER + "mlp.gate.expert_bias"),
        *beside("!" + DELTA, (_renamed(row) for row in LATENT)),
        *beside(DELTA, KDA),
        Row(OURS + GATES, THEIRS + "g_proj.weight"),
    ),
    left_out=WITHOUT_PREDICTION,
)
