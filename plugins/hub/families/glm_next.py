"""GLM-5.3-Flash: delta layers, latent attention that chooses pools of tokens, several residual streams.

The released files hold a vision tower too, under ``glm5_next``: from those the language model is read, and the tower is
left out, as is the layer of multi-token prediction. What is written is the language model, under ``glm5_next_text``, of
which transformers has no class with a head. Names are those of the released files.
"""

from __future__ import annotations

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Key, Part, Unused, dense, refusal, show, sparse
from blockwright.plugins.hub.deepseek_like import (
    CHOICE_BIAS,
    CHOOSES,
    CHOSEN,
    INDEXER,
    LATENT,
    LATENT_NORM,
    LATENT_SIZES,
    SHARED,
    WITHOUT_PREDICTION,
    connection,
    gate,
)
from blockwright.plugins.hub.family import Family, language_of
from blockwright.plugins.hub.hybrid_like import DELTA, LINEAR, VARIANT, kda, read_mixers, taps, types
from blockwright.plugins.hub.llama_like import (
    EPS,
    EXPERTS,
    FRAME,
    FULL,
    GATED_FFN,
    LAYER,
    MIXTURE,
    PRENORM,
    ROUTER,
    SILU,
    SIZES,
    TOP_K,
    expert_width,
    n_experts,
    read_types,
    tied,
)
from blockwright.plugins.hub.names import Row, beside

INDEXED = "indexed_attention"  # what is full attention elsewhere
TEMPLATE: dict[str, Any] = {
    **MIXTURE,
    "attention": {"name": "mla", "selector": {"name": "pooled_dsa", "k_norm": {**LATENT_NORM, "name": "layernorm"}}},
    "position": "none",
    "experts": {"name": "bounded_swiglu"},
    "residual": {"name": "mhc", "mixing": {"name": "sinkhorn"}},
    "variants": {"attention": {"linear": {"name": "kda", "decay": {"name": "channel"}}}},
}

# ---- settings --------------------------------------------------------------------------------------------------------


WIDTHS = {  # key of linear_attn_config, as some copies have it → of transformers
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
    "gate_lower_bound": "linear_lower_bound",
}


def _read_widths(config: Config, model: dict[str, Any]) -> None:
    inner = config.take("linear_attn_config", kind=dict, default={})
    if unknown := sorted(inner.keys() - {*WIDTHS, "safe_gate"}):
        key = f"linear_attn_config.{unknown[0]}"
        raise refusal(key, inner[unknown[0]], "is not known", f"Known: {', '.join(WIDTHS)}, safe_gate")
    config.values |= {flat: inner[key] for key, flat in WIDTHS.items() if key in inner}
    if inner.get("safe_gate", inner) and config.values.get("linear_lower_bound") is None:
        config.values["linear_lower_bound"] = -5.0


def _read_mixers(config: Config, model: dict[str, Any]) -> None:
    found = read_types(config, model, (INDEXED, FULL, LINEAR), lambda i: INDEXED if i % 4 == 3 else LINEAR)
    read_mixers([LINEAR if kind == LINEAR else FULL for kind in found], model)
    linear, lowest = model["variants"]["attention"]["linear"], config.values.get("linear_lower_bound", -5.0)
    config.taken.add("linear_lower_bound")  # null is none, absent is -5
    linear["n_heads"] = config.take("linear_num_heads", kind=int)
    if lowest is not None and not (isinstance(lowest, int | float) and lowest < 0):
        raise refusal("linear_lower_bound", lowest, "must be a negative number or null", "Write -5.0")
    linear["decay"]["most"] = None if lowest is None else -float(lowest)


def _write_mixers(decoder: Decoder, config: dict[str, Any]) -> None:
    config["layer_types"] = [INDEXED if kind == FULL else kind for kind in types(decoder)]
    most, mixer = show(decoder, "linear.attention.decay.most"), show(decoder, "linear.attention")
    config["linear_lower_bound"] = None if most is None else -most
    config["linear_num_heads"] = mixer.value.out_features // mixer.v_head_dim


def _read_pools(config: Config, model: dict[str, Any]) -> None:
    pool, tokens = config.take("index_kpool", kind=int), config.take("index_topk", kind=int)
    if pool < 1 or tokens % pool:
        raise refusal("index_topk", tokens, f"must be a multiple of index_kpool = {pool}", "Correct it in config.json")
    kinds = config.take("indexer_types", kind=list, default=["full"])
    if {*map(str, kinds)} != {"full"}:
        raise refusal("indexer_types", kinds, "must name full alone", "Layers that share a choice are not supported")
    model["attention"]["selector"] |= {"block_size": pool, "top_k": tokens // pool}


def _write_pools(decoder: Decoder, config: dict[str, Any]) -> None:
    selector = show(decoder, "full.attention.selector")
    config |= {"index_kpool": selector.block_size, "index_topk": selector.block_size * selector.top_k}
    config["indexer_types"] = ["full"] * len(decoder.layers)


def _read_layers(config: Config, model: dict[str, Any]) -> None:
    """Which layers are dense, the width of the shared experts together, and the bound of all."""
    depth, limit = model["n_layers"], config.take("swiglu_limit", kind=float)
    kinds = config.take("mlp_layer_types", kind=list, default=[("dense", "sparse")[i > 2] for i in range(depth)])
    if len(kinds) != depth or {*map(str, kinds)} - {"dense", "sparse"} or "sparse" not in kinds:
        rule = f"must name dense or sparse for each of the {depth} layers, and sparse for some"
        raise refusal("mlp_layer_types", kinds, rule, "Correct the list in config.json")
    width, d_ff = config.take("moe_intermediate_size", kind=int), config.take("intermediate_size", kind=int)
    bounded = {"name": "bounded_swiglu", "limit": limit}
    model["experts"]["limit"] = limit
    model["ffn"]["shared"] = {**bounded, "d_ff": config.take("n_shared_experts", kind=int, default=1) * width}
    if "dense" in kinds:
        model["variants"]["ffn"] = {"dense": {**bounded, "d_ff": d_ff}}
        model["layout"]["ffn"] = ["dense" if kind == "dense" else "ffn" for kind in kinds]


def _write_layers(decoder: Decoder, config: dict[str, Any]) -> None:
    kinds = ["sparse" if hasattr(layer.ffn, "gating") else "dense" for layer in decoder.layers]
    config["mlp_layer_types"], width = kinds, expert_width(decoder)
    config["intermediate_size"] = dense(decoder).ffn.gate.out_features if "dense" in kinds else width
    config["n_shared_experts"] = sparse(decoder).ffn.shared.gate.out_features // width


def _read_streams(config: Config, model: dict[str, Any]) -> None:
    eps = config.take("hc_eps", kind=float, default=1e-6)
    model["residual"] |= {"eps": eps, "norm_eps": model["norm"]["eps"]}
    model["residual"]["mixing"]["eps"] = eps


def _write_streams(decoder: Decoder, config: dict[str, Any]) -> None:
    config["hc_eps"] = show(decoder, "first.residual.mixing.eps")


SETTINGS = (
    Given(("routed_scaling_factor", "q_lora_rank")),
    *(*SIZES, *LATENT_SIZES, EPS, SILU, tied(), TOP_K),
    gate(("noaux_tc",), ("noaux_tc",), renormalised=True),
    Key("n_routed_experts", "ffn.n_experts", n_experts),
    Key("moe_intermediate_size", "experts.d_ff", expert_width),
    Key("swiglu_limit", "experts.limit", "sparse.ffn.experts.limit", float),
    Key("index_n_heads", "attention.selector.n_heads", "full.attention.selector.n_heads"),
    Key("index_head_dim", "attention.selector.head_dim", "full.attention.selector.head_dim"),
    Part(_read_widths, lambda decoder, config: None),
    Key("linear_head_dim", VARIANT + "head_dim", "linear.attention.head_dim"),
    Key("linear_conv_kernel_dim", VARIANT + "taps", taps),
    Key("hc_mult", "residual.n_streams", "first.residual.streams"),
    Key("hc_sinkhorn_iters", "residual.mixing.iterations", "first.residual.mixing.iterations"),
    Part(_read_mixers, _write_mixers),
    Part(_read_pools, _write_pools),
    Part(_read_layers, _write_layers),
    Part(_read_streams, _write_streams),
    Fixed("index_kpool_always_select_tail", True),
    Unused("num_nextn_predict_layers"),
)

# ---- names -----------------------------------------------------------------------------------------------------------

POOLS = (
    *INDEXER,
    Row(CHOOSES + "gate.weight", CHOSEN + "index_kpool_compress_gate"),
    Row(CHOOSES + "place", CHOSEN + "index_kpool_compress_ape"),
)
NAMES = (
    *(*FRAME, *PRENORM, *GATED_FFN, *ROUTER, *CHOICE_BIAS, *EXPERTS, *SHARED),
    *(*connection("attention", "attn"), *connection("ffn", "ffn")),
    *beside("!" + DELTA, (*LATENT, *POOLS)),
    *beside(DELTA, (*kda(LAYER + "self_attn."), Row(DELTA, LAYER + "self_attn.A_log"))),
)

GLM5_NEXT = Family(
    model_type="glm5_next_text",
    architecture="Glm5NextTextModel",
    template=TEMPLATE,
    settings=SETTINGS,
    names=NAMES,
    left_out=WITHOUT_PREDICTION,
)
ENDS = (f"{kind}_{end}_token_id" for kind in ("image", "video") for end in ("start", "end"))
PLACES = ("image_token_id", "video_token_id", "vision_config", *ENDS)
GLM5_NEXT_WITH_VISION = language_of(
    GLM5_NEXT, "glm5_next", PLACES, (r"model\.visual\..*", r"model\.language_model\.layers\.{behind}\..*")
)
