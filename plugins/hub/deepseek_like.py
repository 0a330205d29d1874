"""Rows shared by the DeepSeek families: latent attention, leading dense layers, shared experts, three gates."""

from __future__ import annotations

from typing import Any

from blockwright import registry
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Unused, dense, refusal, show, sparse
from blockwright.plugins.hub.llama_like import (
    EXPERTS,
    FRAME,
    GATED_FFN,
    LAYER,
    MIXTURE,
    PRENORM,
    ROUTER,
    TOP_K,
    expert_width,
    n_experts,
)
from blockwright.plugins.hub.names import Row

# ---- names -----------------------------------------------------------------------------------------------------------

LATENT = (
    Row("layers.{i}.attention.query.weight", LAYER + "self_attn.q_proj.weight"),  # uncompressed
    Row("layers.{i}.attention.query.0.weight", LAYER + "self_attn.q_a_proj.weight"),
    Row("layers.{i}.attention.query.1.weight", LAYER + "self_attn.q_a_layernorm.weight"),
    Row("layers.{i}.attention.query.2.weight", LAYER + "self_attn.q_b_proj.weight"),
    Row("layers.{i}.attention.kv_down.weight", LAYER + "self_attn.kv_a_proj_with_mqa.weight"),
    Row("layers.{i}.attention.kv_norm.weight", LAYER + "self_attn.kv_a_layernorm.weight"),
    Row("layers.{i}.attention.kv_up.weight", LAYER + "self_attn.kv_b_proj.weight"),
    Row("layers.{i}.attention.output.weight", LAYER + "self_attn.o_proj.weight"),
)
SHARED = tuple(
    Row(f"layers.{{i}}.ffn.shared.{m}.weight", f"{LAYER}mlp.shared_experts.{m}_proj.weight")
    for m in ("gate", "up", "down")
)
CHOICE_BIAS = (
    Row("layers.{i}.ffn.gating.bias", LAYER + "mlp.gate.e_score_correction_bias"),
    Row("layers.{i}.ffn.gating.moved", ""),
)
LAYERS = (*PRENORM, *LATENT, *GATED_FFN, *ROUTER, *CHOICE_BIAS, *EXPERTS, *SHARED)
BEHIND = "model.layers.{n+i}."


def behind(row: Row) -> Row:
    """A layer's row, for the layer of a multi-token prediction head."""
    ours, theirs = row.ours.replace("layers.{i}.", "mtp.{i}.layer."), row.theirs.replace(LAYER, BEHIND)
    return Row(ours, theirs, row.part, row.form)


# Multi-token prediction head k is layer n + k, and repeats the embedding and the output head.
HEAD_OF_PREDICTION = (
    Row("mtp.{i}.embedding_norm.weight", BEHIND + "enorm.weight"),
    Row("mtp.{i}.hidden_norm.weight", BEHIND + "hnorm.weight"),
    Row("mtp.{i}.project.weight", BEHIND + "eh_proj.weight"),
    Row("mtp.{i}.norm.weight", BEHIND + "shared_head.norm.weight"),
    Row("mtp.{i}.norm.weight", BEHIND + "embed_tokens.weight", copy_of="embedding.weight"),
    Row("mtp.{i}.norm.weight", BEHIND + "shared_head.head.weight", copy_of="head.weight"),
)


def prediction(layers: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of multi-token prediction heads, from those of a layer."""
    return (*map(behind, layers), *HEAD_OF_PREDICTION)


PREDICTION = prediction(LAYERS)
NAMES = (*FRAME, *LAYERS)

CHOOSES, CHOSEN = "layers.{i}.attention.selector.", LAYER + "self_attn.indexer."
INDEXER = (  # of V3.2 and GLM-5
    Row(CHOOSES + "query.weight", CHOSEN + "wq_b.weight"),
    Row(CHOOSES + "key.weight", CHOSEN + "wk.weight"),
    Row(CHOOSES + "k_norm.*", CHOSEN + "k_norm.*"),
    Row(CHOOSES + "weights.weight", CHOSEN + "weights_proj.weight"),
)
PARTS = {"weight": "fn", "bias": "base", "scale": "scale"}  # of what mixes streams: ours → theirs


def connection(part: str, theirs: str) -> tuple[Row, ...]:
    """The rows of a sum over streams, around attention or ffn."""
    at = f"layers.{{i}}.residual.{part}_connection."
    return tuple(Row(at + ours, f"{LAYER}hc_{theirs}_{their}") for ours, their in PARTS.items())


WITHOUT_PREDICTION = (r"model\.layers\.{behind}\..*",)

# ---- settings --------------------------------------------------------------------------------------------------------

LATENT_NORM = {"name": "rmsnorm", "eps": 1e-6}  # fixed in every implementation; rms_norm_eps does not apply
TEMPLATE: dict[str, Any] = {**MIXTURE, "attention": {"name": "mla", "q_norm": LATENT_NORM, "kv_norm": LATENT_NORM}}


def _read_query_rank(config: Config, model: dict[str, Any]) -> None:
    model["attention"]["q_lora_rank"] = config.take("q_lora_rank", kind=int, default=None) or None  # 0 in some copies


def _write_query_rank(decoder: Decoder, config: dict[str, Any]) -> None:
    query = show(decoder, "full.attention.query")
    config["q_lora_rank"] = query[0].out_features if hasattr(query, "__getitem__") else None
    config["num_key_value_heads"] = config["num_attention_heads"]


LATENT_SIZES = (
    Key("num_attention_heads", "attention.n_heads", "full.attention.n_heads"),
    Key("kv_lora_rank", "attention.kv_lora_rank", "full.attention.latent"),
    Key("qk_nope_head_dim", "attention.qk_nope_head_dim", "full.attention.nope"),
    Key("qk_rope_head_dim", "attention.qk_rope_head_dim", "full.attention.rope"),
    Key("v_head_dim", "attention.v_head_dim", "full.attention.v_head_dim"),
    Part(_read_query_rank, _write_query_rank),
    Unused("num_key_value_heads"),  # keys and values are expanded for every head
    Unused("head_dim"),
    Unused("qk_head_dim"),
    Fixed("attention_bias", False),
)
MLA = (
    *LATENT_SIZES,
    Fixed("mlp_bias", False, written=False),
    Fixed("use_mla", True, written=False),
)


def _read_layers(config: Config, model: dict[str, Any]) -> None:
    """Leading dense layers; shared experts become one network of their total width."""
    width, leading = config.take("moe_intermediate_size", kind=int), config.take("first_k_dense_replace", default=0)
    shared = config.take("n_shared_experts", kind=int, default=0)
    model["ffn"]["shared"] = {"name": "swiglu", "d_ff": shared * width} if shared else None
    d_ff = config.take("intermediate_size", kind=int, default=width)
    if not isinstance(leading, int) or not 0 <= leading < model["n_layers"]:
        rule = f"must leave some of the {model['n_layers']} layers with experts"
        raise refusal("first_k_dense_replace", leading, rule, "Read a dense model as llama")
    if leading:
        model["variants"] = {"ffn": {"dense": {"name": "swiglu", "d_ff": d_ff}}}
        model["layout"] = {"ffn": f"dense*{leading} ffn*"}


def _write_layers(decoder: Decoder, config: dict[str, Any]) -> None:
    leading = list(decoder.layers).index(sparse(decoder))
    shared = sparse(decoder).ffn.shared
    config["first_k_dense_replace"] = leading
    config["n_shared_experts"] = 0 if shared is None else shared.gate.out_features // expert_width(decoder)
    config["intermediate_size"] = dense(decoder).ffn.gate.out_features if leading else expert_width(decoder)


MOE = (
    Key("n_routed_experts", "ffn.n_experts", n_experts),
    Key("moe_intermediate_size", "experts.d_ff", expert_width),
    TOP_K,
    Part(_read_layers, _write_layers),
    Fixed("moe_layer_freq", 1, written=False),
)

GATES = {  # topk_method → (gate, scoring_func)
    "greedy": ("softmax_topk", "softmax"),
    "group_limited_greedy": ("group_limited", "softmax"),
    "noaux_tc": ("sigmoid_bias", "sigmoid"),
}


SOFTMAX = ("greedy", "group_limited_greedy")


def gate(read_as: tuple[str, ...], written: tuple[str, ...], renormalised: bool) -> Part:
    """The settings of the gate.

    Args:
        read_as: accepted values of topk_method; the first is the default
        written: values that are written; a decoder with another gate belongs to another family
        renormalised: norm_topk_prob when the key is absent
    """

    def read(config: Config, model: dict[str, Any]) -> None:
        method = config.take("topk_method", default=read_as[0])
        if method not in read_as:
            raise refusal("topk_method", method, "is not supported", f"Known: {', '.join(read_as)}")
        name, scoring = GATES[method]
        given = config.take("scoring_func", default=scoring)
        if given != scoring:
            raise refusal("scoring_func", given, f"topk_method {method!r} requires {scoring!r}", f"Write {scoring}")
        # Whether to renormalise the weights, and their factor. V2's released code scales weights only where
        # it does not renormalise; V3's scales them always.
        renormalise = config.take("norm_topk_prob", kind=bool, default=renormalised)
        scaling = config.take("routed_scaling_factor", kind=float, default=1.0)
        skipped = renormalise and method != "noaux_tc"
        weights = {"renormalise": renormalise, "scaling": 1.0 if skipped else scaling}
        model["gating"] |= {"name": name, **weights, **_groups(config, method)}

    def write(decoder: Decoder, config: dict[str, Any]) -> None:
        gating = sparse(decoder).ffn.gating
        config["norm_topk_prob"], config["routed_scaling_factor"] = gating.renormalise, gating.scaling
        config["n_group"], config["topk_group"] = getattr(gating, "n_groups", 1), getattr(gating, "top_groups", 1)
        found = next(m for m in written if isinstance(gating, registry.lookup("gating", GATES[m][0]).cls))
        config["topk_method"], config["scoring_func"] = found, GATES[found][1]

    return Part(read, write)


def _groups(config: Config, method: str) -> dict[str, Any]:
    n_groups = config.take("n_group", kind=int, default=1)
    top_groups = config.take("topk_group", kind=int, default=1)
    return {} if method == "greedy" else {"n_groups": n_groups, "top_groups": top_groups}


def _read_prediction(config: Config, model: dict[str, Any]) -> None:
    depth = config.take("num_nextn_predict_layers", kind=int, default=0)
    if depth and config.mtp:
        model["mtp"] = {"depth": depth}


def _write_prediction(decoder: Decoder, config: dict[str, Any]) -> None:
    config["num_nextn_predict_layers"] = len(getattr(decoder, "mtp", None) or ())


PREDICTED = Part(_read_prediction, _write_prediction)


# ---- the indexer of V3.2 and GLM-5 -----------------------------------------------------------------------------------

SELECTOR = {"name": "dsa", "k_norm": {"name": "layernorm", "eps": LATENT_NORM["eps"]}}


def index_sizes(ours: str) -> tuple[Key, ...]:
    """The sizes of the indexer, whose node stands at ``ours`` in the composition."""
    shown = "first.attention.selector."
    return (
        Key("index_n_heads", ours + "n_heads", shown + "n_heads"),
        Key("index_head_dim", ours + "head_dim", shown + "head_dim"),
        Key("index_topk", ours + "top_k", shown + "top_k"),
    )


def read_kinds(config: Config, model: dict[str, Any]) -> None:
    """Lists of each layer's kind, which transformers writes beside the numbers that they follow from."""
    n, leading = model["n_layers"], config.take("first_k_dense_replace", default=0)
    for key, right in (
        ("mlp_layer_types", ["dense"] * leading + ["sparse"] * (n - leading)),
        ("layer_types", ["indexed_attention"] * n),
    ):
        given = config.take(key, default=None)
        if given is not None and given != right:
            raise refusal(key, given, f"must be {right}", "Layers of other kinds are not supported")
