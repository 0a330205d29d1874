"""DeepSeek-V4: attention over means of windows, several residual streams, and experts by token id in the first layers.

Names are those of the released files, with ``model.`` before most of them as transformers saves them. The heads of
multi-token prediction are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Unused, refusal, show
from blockwright.plugins.hub.deepseek_like import PARTS, connection
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    EPS,
    LAYER,
    MIXTURE,
    SILU,
    SIZES,
    TABLES,
    expert_width,
    n_experts,
    read_types,
    tied,
)
from blockwright.plugins.hub.names import Row, expert_gate, expert_up, one_expert
from blockwright.plugins.hub.rope import Habits, read_rope

# ---- names -----------------------------------------------------------------------------------------------------------

ATTENTION = "layers.{i}.attention."
MATRICES = {"gate": "w1", "down": "w2", "up": "w3"}


def joined(ours: Tensor, expert: int) -> Tensor:
    """[G,L,·] → [G·L,·]: groups one below the other."""
    return ours.flatten(0, 1)


def pool(ours: str, theirs: str, norm: str) -> tuple[Row, ...]:
    """The rows of what makes keys of windows, and of their norm."""
    ours, theirs, norm = ATTENTION + ours, LAYER + "attn." + theirs, ATTENTION + norm
    return (
        Row(ours + "value.weight", theirs + "wkv.weight"),
        Row(ours + "gate.weight", theirs + "wgate.weight"),
        Row(ours + "place", theirs + "ape"),
        Row(norm + ".weight", theirs + "norm.weight"),
    )


MAPS = {"q_down": "wq_a", "q_norm": "q_norm", "q_up": "wq_b", "kv": "wkv", "output": "wo_b"}
NAMES = (
    Row("embedding.weight", "model.embed_tokens.weight", also="model.embed.weight"),
    Row("norm.weight", "model.norm.weight"),
    Row("head.weight", "head.weight", also="lm_head.weight"),
    Row("layers.{i}.residual.attention_norm.weight", LAYER + "attn_norm.weight"),
    Row("layers.{i}.residual.ffn_norm.weight", LAYER + "ffn_norm.weight"),
    *(*connection("attention", "attn"), *connection("ffn", "ffn")),
    *(
        Row("layers.{i}.residual.closing." + our, f"model.hc_head.hc_{their}", also=f"model.hc_head_{their}")
        for our, their in PARTS.items()
    ),
    *(Row(f"{ATTENTION}{our}.weight", f"{LAYER}attn.{their}.weight") for our, their in MAPS.items()),
    Row(ATTENTION + "kv_norm.weight", LAYER + "attn.norm.weight", also=LAYER + "attn.kv_norm.weight"),
    Row(ATTENTION + "group", LAYER + "attn.wo_a.weight", joined),
    Row(ATTENTION + "scores.sinks", LAYER + "attn.attn_sink"),
    *pool("compressor.pool.", "compressor.", "compressor.norm"),
    *pool("compressor.index_pool.", "indexer.compressor.", "compressor.index_norm"),
    Row(ATTENTION + "compressor.index.query.weight", LAYER + "attn.indexer.wq_b.weight"),
    Row(ATTENTION + "compressor.index.weights.weight", LAYER + "attn.indexer.weights_proj.weight"),
    Row("layers.{i}.ffn.gating.weight", LAYER + "ffn.gate.weight"),
    Row("layers.{i}.ffn.gating.bias", LAYER + "ffn.gate.bias"),
    Row("layers.{i}.ffn.gating.moved", ""),
    Row("layers.{i}.ffn.gating.table", LAYER + "ffn.gate.tid2eid"),
    Row("layers.{i}.ffn.experts.gate_up", LAYER + "ffn.experts.{e}.w1.weight", expert_gate),
    Row("layers.{i}.ffn.experts.gate_up", LAYER + "ffn.experts.{e}.w3.weight", expert_up),
    Row("layers.{i}.ffn.experts.down", LAYER + "ffn.experts.{e}.w2.weight", one_expert),
    *(
        Row(f"layers.{{i}}.ffn.shared.{our}.weight", f"{LAYER}ffn.shared_experts.{their}.weight")
        for our, their in MATRICES.items()
    ),
)

# ---- settings --------------------------------------------------------------------------------------------------------

NEAR, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = {NEAR: "near", CSA: "attention", HCA: "hca"}  # kind of a layer → our variant
ROUTED, HASHED = "moe", "hash_moe"
RATES = {CSA: 4, HCA: 128}
TURNS = Habits("interleaved")


def _compressors(decoder: Decoder) -> list[Any]:
    return [layer.attention.compressor for layer in decoder.layers]  # type: ignore[union-attr]


def _of(decoder: Decoder, name: str) -> Any:
    """The first compressor of this name, or None."""
    return next((c for c in _compressors(decoder) if type(c).__name__.lower() == name), None)


def _read_attention(config: Config, model: dict[str, Any]) -> None:
    """The kinds of attention, the windows of each, and which layer has which."""
    rates = {**RATES, **config.take("compress_rates", kind=dict, default={})}
    for kind, short in ((CSA, "csa"), (HCA, "hca")):
        rates[kind] = config.take(f"compress_rate_{short}", kind=int, default=rates[kind])
    if set(rates) != set(RATES) or any(type(rate) is not int for rate in rates.values()):
        raise refusal(
            "compress_rates", rates, f"must be tokens for {CSA} and {HCA}", "Correct the value in config.json"
        )
    ratios = config.take("compress_ratios", kind=list, default=None)
    by_ratio = {0: NEAR, **{rate: kind for kind, rate in rates.items()}}
    if ratios is not None and not all(type(ratio) is int and ratio in by_ratio for ratio in ratios):
        rule = f"must be {', '.join(map(str, by_ratio))} for each layer"
        raise refusal("compress_ratios", ratios, rule, "Write compress_rates where windows have other lengths")

    def default(i: int) -> str:
        if ratios is not None and i < len(ratios):
            return by_ratio[ratios[i]]
        return HCA if i < 2 or i % 2 == 0 else CSA

    kinds = read_types(config, model, tuple(KINDS), default)
    model["attention"]["compressor"] = {
        "name": "csa",
        "every": rates[CSA],
        "n_heads": config.take("index_n_heads", kind=int, default=64),
        "head_dim": config.take("index_head_dim", kind=int, default=128),
        "top_k": config.take("index_topk", kind=int, default=512),
    }
    variants = {"near": {"compressor": None}, "hca": {"compressor": {"name": "hca", "every": rates[HCA]}}}
    model["variants"]["attention"] = variants
    model["layout"]["attention"] = [KINDS[kind] for kind in kinds]


def _write_attention(decoder: Decoder, config: dict[str, Any]) -> None:
    names = {"NoneType": NEAR, "CSA": CSA, "HCA": HCA}
    config["layer_types"] = [names[type(c).__name__] for c in _compressors(decoder)]
    csa, hca = _of(decoder, "csa"), _of(decoder, "hca")
    config["compress_rates"] = {CSA: csa.every if csa else RATES[CSA], HCA: hca.every if hca else RATES[HCA]}
    if csa:
        config |= {"index_n_heads": csa.index.n_heads, "index_head_dim": csa.index.head_dim}
        config["index_topk"] = csa.index.top_k


def _read_width(config: Config, model: dict[str, Any]) -> None:
    """The rotated part of a head, as a number or as a share of the head."""
    width = config.take("head_dim", kind=int)
    share = config.take("partial_rotary_factor", kind=float, default=64 / 512)
    model["attention"]["rope_head_dim"] = config.take("qk_rope_head_dim", kind=int, default=int(width * share))


def _write_width(decoder: Decoder, config: dict[str, Any]) -> None:
    attention = show(decoder, "first.attention")
    config |= {"qk_rope_head_dim": attention.rope, "partial_rotary_factor": attention.rope / attention.head_dim}


def _read_positions(config: Config, model: dict[str, Any]) -> None:
    """Positions of layers without and with a compressor; YaRN's temperature is off in these."""
    near = config.take("rope_theta", kind=float, default=10000.0)
    far = config.take("compress_rope_theta", kind=float, default=160000.0)
    given = config.take("rope_parameters", kind=dict, default={})
    scaling = config.take("rope_scaling", kind=dict, default={})
    nested = {"main", "compress"} <= given.keys()
    for name, theta in (("main", near), ("compress", far)):
        own = given[name] if nested else {**scaling, **given} if name == "compress" else {}
        node = _position(name, own, theta, config)
        if name == "compress":
            model["position"] = node
        else:
            model["variants"]["attention"]["near"]["position"] = node


def _position(name: str, given: Any, theta: float, config: Config) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise refusal(f"rope_parameters.{name}", given, "must be a mapping", "Correct the value in config.json")
    own = {key: value for key, value in given.items() if key != "partial_rotary_factor"}
    if own.pop("attention_factor", 1.0) != 1.0:
        raise refusal(f"rope_parameters.{name}.attention_factor", given["attention_factor"], "must be 1", "Correct it")
    values = {"rope_parameters": {"rope_theta": theta, **own}}
    node = read_rope(Config({**values, "max_position_embeddings": config.values["max_position_embeddings"]}), TURNS)
    return node if node["name"] != "yarn" else {**node, "mscale": 0.0, "mscale_all_dim": 0.0}


def _write_positions(decoder: Decoder, config: dict[str, Any]) -> None:
    share = config["partial_rotary_factor"]
    found = {}
    for name, theta, wanted in (("main", 10000.0, False), ("compress", 160000.0, True)):
        layers: Any = [layer.attention for layer in decoder.layers]
        position = next((a.position for a in layers if (a.compressor is not None) == wanted), None)
        own = {"rope_type": "default", "rope_theta": getattr(position, "theta", theta), "partial_rotary_factor": share}
        if type(position).__name__ == "YaRN":
            keys = {"factor": "factor", "original_max_position_embeddings": "original_positions"}
            keys |= {key: key for key in ("beta_fast", "beta_slow", "truncate")}
            own |= {"rope_type": "yarn", "attention_factor": 1.0, **{k: getattr(position, v) for k, v in keys.items()}}
        found[name] = own
    config |= {"rope_parameters": found, "rope_theta": found["main"]["rope_theta"]}
    config["compress_rope_theta"] = found["compress"]["rope_theta"]


def _read_experts(config: Config, model: dict[str, Any]) -> None:
    """Widths and bounds of experts, and the layers that route by token id."""
    width, shared = config.take("moe_intermediate_size", kind=int), config.take("n_shared_experts", kind=int, default=1)
    limit = config.take("swiglu_limit", kind=float, default=10.0)
    model["experts"] |= {"d_ff": width, "limit": limit}
    model["ffn"]["shared"] = {"name": "bounded_swiglu", "d_ff": shared * width, "limit": limit} if shared else None
    leading = config.take("num_hash_layers", kind=int, default=3)
    by_number = [HASHED] * min(leading, model["n_layers"]) + [ROUTED] * max(0, model["n_layers"] - leading)
    kinds = config.take("mlp_layer_types", kind=list, default=by_number)
    if len(kinds) != model["n_layers"] or {*map(str, kinds)} - {HASHED, ROUTED}:
        rule = f"must name {HASHED} or {ROUTED} for each of the {model['n_layers']} layers"
        raise refusal("mlp_layer_types", kinds, rule, "Correct the list in config.json")
    chosen = {key: model["gating"][key] for key in ("top_k", "scaling")}
    model["variants"]["gating"] = {"hash": {"name": "hash_softplus", **chosen}}
    model["layout"]["gating"] = ["hash" if kind == HASHED else "gating" for kind in kinds]


def _write_experts(decoder: Decoder, config: dict[str, Any]) -> None:
    ffn, width = show(decoder, "sparse.ffn"), expert_width(decoder)
    config |= {"moe_intermediate_size": width, "swiglu_limit": ffn.experts.limit}
    config["n_shared_experts"] = 0 if ffn.shared is None else ffn.shared.gate.out_features // width
    gates: Any = [layer.ffn.gating for layer in decoder.layers]  # type: ignore[union-attr]
    config["mlp_layer_types"] = [HASHED if gate.by_id else ROUTED for gate in gates]
    config["num_hash_layers"] = sum(gate.by_id for gate in gates)


def _read_streams(config: Config, model: dict[str, Any]) -> None:
    eps = config.take("hc_eps", kind=float, default=1e-6)
    if eps != config.take("rms_norm_eps", kind=float, default=1e-6):
        raise refusal("hc_eps", eps, "must be rms_norm_eps: one number is both here", "Released models have 1e-6 twice")
    model["residual"] |= {"eps": eps, "norm_eps": eps, "n_streams": config.take("hc_mult", kind=int, default=4)}
    iterations = config.take("hc_sinkhorn_iters", kind=int, default=20)
    model["residual"]["mixing"] = {"name": "sinkhorn", "iterations": iterations, "eps": eps}
    model["residual"]["closing"] = {"name": "weighted", "eps": eps}
    model["attention"]["query_norm"] = {"name": "unit_rms", "eps": eps}


def _write_streams(decoder: Decoder, config: dict[str, Any]) -> None:
    residual = show(decoder, "first.residual")
    config |= {"hc_mult": residual.streams, "hc_sinkhorn_iters": residual.mixing.iterations}
    config["hc_eps"] = residual.mixing.eps


def _read_prediction(config: Config, model: dict[str, Any]) -> None:
    depth = config.take("num_nextn_predict_layers", kind=int, default=0)
    if depth and config.mtp:
        rule = "heads of multi-token prediction of this family are not supported"
        raise refusal("num_nextn_predict_layers", depth, rule, "Leave out --mtp")


def _write_prediction(decoder: Decoder, config: dict[str, Any]) -> None:
    if getattr(decoder, "mtp", None):
        raise AttributeError("heads of multi-token prediction of this family are not supported")
    config["num_nextn_predict_layers"] = 0


def _group_width(decoder: Decoder) -> int:
    return show(decoder, "first.attention.group").shape[1]


GATING = "sparse.ffn.gating."
DEEPSEEK_V4 = Family(
    model_type="deepseek_v4",
    architecture="DeepseekV4ForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "shared_kv", "scores": {"name": "sinks"}},
        "gating": {"name": "softplus_bias"},
        "experts": {"name": "bounded_swiglu"},
        "residual": {"name": "mhc"},
        "variants": {},
        "layout": {},
    },
    settings=(
        *(*SIZES, EPS, SILU, tied()),
        Key("num_attention_heads", "attention.n_heads", "first.attention.n_heads"),
        Key("head_dim", "attention.head_dim", "first.attention.head_dim"),
        Key("q_lora_rank", "attention.q_lora_rank", "first.attention.q_down.out_features"),
        Key("o_groups", "attention.n_groups", "first.attention.n_groups", default=8),
        Key("o_lora_rank", "attention.o_lora_rank", _group_width, default=1024),
        Key("sliding_window", "attention.window", "first.attention.window", default=128),
        Key("n_routed_experts", "ffn.n_experts", n_experts, also=("num_local_experts",)),
        Key("num_experts_per_tok", "gating.top_k", GATING + "top_k"),
        Key("routed_scaling_factor", "gating.scaling", GATING + "scaling", float, 1.5),
        Part(_read_streams, _write_streams),
        Part(_read_width, _write_width),
        Part(_read_attention, _write_attention),
        Part(_read_positions, _write_positions),
        Part(_read_experts, _write_experts),
        Part(_read_prediction, _write_prediction),
        Unused("expert_dtype"),  # seen from the files: plugins/hub/packed.py
        Fixed("num_key_value_heads", 1),
        Fixed("scoring_func", "sqrtsoftplus"),
        Fixed("norm_topk_prob", True),
        Fixed("topk_method", "noaux_tc", written=False),
        Fixed("attention_bias", False),
        Fixed("mlp_bias", False),
    ),
    names=NAMES,
    left_out=(*TABLES, r"(model\.)?mtp\..*"),
)
