"""Inkling, text: a banded bias that queries mix instead of positions, short convolutions, a router with a sink.

Read from checkpoints of text models (``inkling_text``); those of ``inkling_mm_model``, with towers and heads of
multi-token prediction, are not.
"""

from typing import Any

from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Unused, dense, refusal, show, sparse
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import ATTENTION, LAYER, MIXTURE, QK_NORM, SILU, SIZES, expert_width, read_types
from blockwright.plugins.hub.names import TAPS, Row

FULL, SLIDING = "hybrid", "hybrid_sliding"
NORM = {"name": "rmsnorm"}
RESIDUAL = "layers.{i}.residual.residual."
FFN, MLP, ATTEND = "layers.{i}.ffn.", LAYER + "mlp.", LAYER + "self_attn."

# ---- settings --------------------------------------------------------------------------------------------------------

HEADS = {"num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim"}


def _heads(config: Config, prefix: str) -> dict[str, Any]:
    found = {ours: config.take(prefix + theirs, kind=int) for theirs, ours in HEADS.items()}
    return {**found, "query_scale": float(found["head_dim"]) ** 2}  # heads are normalised: scores over their width


def _read_attention(config: Config, model: dict[str, Any]) -> None:
    """Windows, whose bias reaches as far, and full attention with more of both."""
    near = config.take("local_layer_ids", kind=list, default=None)
    kinds = read_types(
        config, model, (SLIDING, FULL), lambda i: SLIDING if (i in near if near is not None else (i + 1) % 6) else FULL
    )
    rank, window = config.take("d_rel", kind=int), config.take("sliding_window_size", "sliding_window", kind=int)
    taps = {"name": "canon", "taps": config.take("conv_kernel_size", "sconv_kernel_size", kind=int)}
    banded = {"name": "banded", "rank": rank, "extent": window}
    far = {**banded, "extent": config.take("rel_extent", kind=int)}
    model["attention"] |= {**_heads(config, "swa_"), "window": window, "key_conv": taps, "value_conv": taps}
    floor = config.take("log_scaling_n_floor", kind=int, default=None)
    scale = config.take("log_scaling_alpha", kind=float, default=0.1)
    scaled = far if floor is None else {"name": "log_scaled", "floor": floor, "scale": scale, "inner": far}
    full = {**_heads(config, ""), "window": None, "position": scaled}
    model["position"], model["variants"] = banded, {"attention": {"full": full}}
    model["layout"] = {"attention": ["full" if kind == FULL else "attention" for kind in kinds]}
    model["residual"]["residual"] |= {"attention_out_conv": taps, "ffn_out_conv": taps}


def _write_attention(decoder: Decoder, config: dict[str, Any]) -> None:
    attentions: list[Any] = [layer.attention for layer in decoder.layers]
    config["layer_types"] = [FULL if attention.window is None else SLIDING for attention in attentions]
    windows, others = ([a for a in attentions if (a.window is None) == full] for full in (False, True))
    near, full = (windows or others)[0], (others or windows)[0]
    for prefix, found in (("swa_", near), ("", full)):
        config[prefix + "num_attention_heads"] = found.query.out_features // found.head_dim
        config |= {prefix + "num_key_value_heads": found.n_kv_heads, prefix + "head_dim": found.head_dim}
    config["sliding_window_size"] = near.window or near.position.bank.shape[1]
    config["conv_kernel_size"] = attentions[0].key_conv.weight.shape[1]
    position = full.position
    if (inner := getattr(position, "inner", None)) is not None:
        config |= {"log_scaling_n_floor": position.floor, "log_scaling_alpha": position.scale}
        position = inner
    config["d_rel"], config["rel_extent"] = position.bank.shape


def _read_layers(config: Config, model: dict[str, Any]) -> None:
    """Leading dense layers; shared experts are the last of the stack, of the routed ones' width."""
    depth, leading = model["n_layers"], config.take("dense_mlp_idx", kind=int, default=0)
    kinds = config.take("mlp_layer_types", kind=list, default=None)
    kinds = ["dense" if i < leading else "sparse" for i in range(depth)] if kinds is None else kinds
    if len(kinds) != depth or {*map(str, kinds)} - {"dense", "sparse"} or "sparse" not in kinds:
        rule = f"must name dense or sparse for each of the {depth} layers, and sparse for some"
        raise refusal("mlp_layer_types", kinds, rule, "Correct the list in config.json")
    wide = config.take("dense_intermediate_size", kind=int, default=None)
    width = config.take("intermediate_size", kind=int)
    F = config.take("moe_intermediate_size", kind=int, default=None if wide is None else width)
    if F is None:
        raise refusal("moe_intermediate_size", None, "is required", "Use a config.json that has it")
    routed, shared, chosen = (
        config.take(key, *also, kind=int)
        for key, *also in (("n_routed_experts", "num_local_experts"), ("n_shared_experts",), ("num_experts_per_tok",))
    )
    if shared < 1:
        raise refusal("n_shared_experts", shared, "must be at least 1", "Correct the value in config.json")
    model["ffn"]["n_experts"], model["experts"]["d_ff"] = routed + shared, F if wide is None else width
    model["gating"] |= {"top_k": chosen + shared, "n_shared": shared}
    if "dense" in kinds:
        ffn = {"name": "swiglu", "d_ff": width if wide is None else wide}
        model["variants"]["ffn"] = {"dense": {"name": "scaled", "ffn": ffn}}
        model["layout"]["ffn"] = ["dense" if kind == "dense" else "ffn" for kind in kinds]


def _write_layers(decoder: Decoder, config: dict[str, Any]) -> None:
    kinds = ["sparse" if hasattr(layer.ffn, "gating") else "dense" for layer in decoder.layers]
    gating, config["mlp_layer_types"] = sparse(decoder).ffn.gating, kinds
    config |= {"n_routed_experts": gating.n_routed, "n_shared_experts": gating.n_shared}
    config["num_experts_per_tok"] = gating.top_k - gating.n_shared
    config["moe_intermediate_size"] = expert_width(decoder)
    wide = dense(decoder).ffn.ffn.gate.out_features if "dense" in kinds else expert_width(decoder)
    config["intermediate_size"] = wide


def _read_head(config: Config, model: dict[str, Any]) -> None:
    by = config.take("logits_mup_width_multiplier", "embedding_multiplier", kind=float)
    model["norm"] = {"name": "divided", "norm": {**NORM, "eps": model["norm"]["eps"]}, "by": by}
    rows = config.take("unpadded_vocab_size", kind=int, default=model["vocab_size"])
    if rows < model["vocab_size"]:
        rule = (
            f"leaves out the logits of the last {model['vocab_size'] - rows} rows of the head, which is not supported"
        )
        raise refusal(
            "unpadded_vocab_size", rows, rule, "Cut the embedding and the head to so many rows, and vocab_size"
        )


def _write_head(decoder: Decoder, config: dict[str, Any]) -> None:
    config["logits_mup_width_multiplier"] = show(decoder, "norm.by")


def _read_eps(config: Config, model: dict[str, Any]) -> None:
    eps = config.take("rms_norm_eps", kind=float)
    norm = {**NORM, "eps": eps}
    model["norm"] = norm
    model["attention"]["qk_norm"] = {"name": "per_head", "q_norm": norm, "k_norm": norm}
    inner = {"name": "prenorm", "attention_norm": norm, "ffn_norm": norm}
    model["residual"] = {
        "name": "normed_embeddings",
        "norm": norm,
        "residual": {"name": "convolved", "residual": inner},
    }


def _write_eps(decoder: Decoder, config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = show(decoder, "norm.norm.eps")


# ---- names -----------------------------------------------------------------------------------------------------------


def _experts(decoder: Decoder) -> tuple[Row, ...]:
    """Routed experts are stored apart from the shared ones, which are the last of ours."""
    gating = sparse(decoder).ffn.gating
    R, stack, shared = gating.n_routed, MLP + "experts.", MLP + "shared_experts."

    def routed(ours: Tensor, expert: int) -> Tensor:
        return ours[:R]

    return (
        Row(FFN + "experts.gate_up", stack + "gate_up_proj", routed),
        Row(FFN + "experts.down", stack + "down_proj", routed),
        Row(FFN + "experts.gate_up", shared + "gate_proj", lambda ours, expert: ours[R:].chunk(2, 1)[0]),
        Row(FFN + "experts.gate_up", shared + "up_proj", lambda ours, expert: ours[R:].chunk(2, 1)[1]),
        Row(FFN + "experts.down", shared + "down_proj", lambda ours, expert: ours[R:]),
    )


CONVOLUTIONS = {
    "attention.key_conv": "self_attn.k_sconv",
    "attention.value_conv": "self_attn.v_sconv",
    "residual.residual.attention_out_conv": "attn_sconv",
    "residual.residual.ffn_out_conv": "mlp_sconv",
}
NAMES = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("layers.0.residual.norm.weight", "model.embed_tokens.embed_norm.weight"),
    Row("norm.norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
    Row(RESIDUAL + "residual.attention_norm.weight", LAYER + "input_layernorm.weight"),
    Row(RESIDUAL + "residual.ffn_norm.weight", LAYER + "post_attention_layernorm.weight"),
    *(*ATTENTION, *QK_NORM),
    *(
        Row(f"layers.{{i}}.attention.position.{inner}{ours}", ATTEND + theirs)
        for inner in ("", "inner.")
        for ours, theirs in (("mixture.weight", "r_proj.weight"), ("bank", "rel_logits_proj.proj"))
    ),
    *(Row(f"layers.{{i}}.{o}.weight", f"{LAYER}{t}.conv1d.weight", form=TAPS) for o, t in CONVOLUTIONS.items()),
    *(Row(f"{FFN}ffn.{m}.weight", f"{MLP}{m}_proj.weight") for m in ("gate", "up", "down")),
    Row(FFN + "gain", MLP + "global_scale"),
    Row(FFN + "gating.weight", MLP + "gate.weight"),
    Row(FFN + "gating.bias", MLP + "gate.e_score_correction_bias"),
    Row(FFN + "gating.gain", MLP + "gate.global_scale"),
)

INKLING = Family(
    model_type="inkling_text",
    architecture="InklingForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "sliding_window"},
        "gating": {"name": "sigmoid_sink"},
    },
    settings=(
        *SIZES[:3],
        Key(SIZES[3].theirs, SIZES[3].ours, SIZES[3].shown, also=("model_max_length",)),
        Part(_read_eps, _write_eps),
        Part(_read_attention, _write_attention),
        Part(_read_layers, _write_layers),
        Key("route_scale", "gating.scaling", "sparse.ffn.gating.scaling", float),
        Part(_read_head, _write_head),
        *(SILU, Fixed("shared_expert_sink", True), Fixed("tie_word_embeddings", False)),
        *(Fixed("num_mtp_layers", None, written=False),),
        *(Unused(key) for key in ("chain_hidden_post_norm", "mtp_hidden_states_first", "mtp_local_layer_ids")),
        *(Unused(key) for key in ("number_of_conv_states", "rms_norm_eps_moe_gate")),  # constant; of no layer
    ),
    names=NAMES,
    left_out=(r"model\.mtp\..*",),
    sized=_experts,
)
