"""Gemma 4, text: keys and values shared by the upper layers, embeddings for each layer, full layers of other heads.

Read from checkpoints of text models (``gemma4_text``), dense or with experts beside the dense network (26B-A4B); those
of ``gemma4``, with towers, are not. Released files have keys and values of borrowing layers too, which nothing reads;
they are skipped.
"""

from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, refusal
from blockwright.plugins.hub.families.gemma import NORM_ROWS, positions_of_kinds
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    FRAME,
    FULL,
    GATED_FFN,
    GELU_TANH,
    GIVEN_HEADS,
    LAYER,
    QK_NORM,
    SIZES,
    SLIDING,
    read_types,
    tied,
)
from blockwright.plugins.hub.names import Form, Row, one_of
from blockwright.plugins.hub.rope import Habits, parameters

HABITS = {FULL: Habits("half_split", theta=1e6, fraction=0.25), SLIDING: Habits("half_split", theta=1e4)}
ABSENT = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
KINDS = (FULL, SLIDING)

# ---- attention -------------------------------------------------------------------------------------------------------


def _read_attention(config: Config, model: dict[str, Any]) -> None:
    """Windows and full layers, with heads and positions of their own, and from which layer on keys are borrowed."""
    types = read_types(config, model, KINDS, lambda i: SLIDING if (i + 1) % 6 else FULL)
    if types[-1] != FULL:
        rule = f"must end with {FULL}"
        raise refusal("layer_types", types[-1], rule, "Correct the list in config.json")
    given = config.take("rope_parameters", kind=dict, default={})
    if given.keys() - HABITS.keys():
        raise refusal("rope_parameters", given, f"must have the keys {FULL} and {SLIDING}", "Correct config.json")
    positions = positions_of_kinds(config, {kind: given.get(kind) or ABSENT[kind] for kind in KINDS}, HABITS)
    tied_values = config.take("attention_k_eq_v", kind=bool, default=False)
    window = {"name": "sliding_window", "window": config.take("sliding_window", kind=int)}
    own = {"qk_norm": {"name": "per_head"}, "query_scale": 1.0}
    model["attention"] |= {**window, **own}
    full = {**_full_heads(config, types, tied_values), "position": positions[FULL]}
    if tied_values:
        full = {**{k: v for k, v in model["attention"].items() if k != "window"}, **full, "name": "keys_as_values"}
    else:
        full["window"] = None
    model["position"] = positions[SLIDING]
    model["variants"] = {"attention": {"full": full}, "kv_source": {"own": None}, "values": {"none": None}}
    model["values"] = {"name": "normed", "norm": {"name": "unit_rms", "eps": model["norm"]["eps"]}}
    shared = _shared(config, types)
    first = len(types) - shared
    lends = {len(types[:first]) - 1 - types[:first][::-1].index(kind) for kind in set(types)} if shared else set()
    model["layout"] = {
        "attention": ["full" if kind == FULL else "attention" for kind in types],
        "values": ["values" if i < first else "none" for i in range(len(types))],
        "kv_source": ["borrowed" if i >= first else "lent" if i in lends else "own" for i in range(len(types))],
    }


def _full_heads(config: Config, types: list[str], tied_values: bool) -> dict[str, Any]:
    """Width and number of the heads of full layers: by layer, or by older keys for all of them."""
    by_layer = config.take("per_layer_config", kind=dict, default=None)
    width = config.take("global_head_dim", kind=int, default=512)
    heads = config.take("num_global_key_value_heads", kind=int, default=None)
    older = {"head_dim": width, **({"num_key_value_heads": heads} if heads is not None and tied_values else {})}
    full = [i for i, kind in enumerate(types) if kind == FULL]
    found = dict.fromkeys(full, older) if by_layer is None else {_index(key): own for key, own in by_layer.items()}
    known = {"head_dim", "num_key_value_heads"}
    ours: Any = found.get(full[0], {})
    same = isinstance(ours, dict) and set(found) == set(full) and all(each == ours for each in found.values())
    if not same or ours.keys() - known or not all(type(n) is int for n in ours.values()):
        rule = f"must give every {FULL} layer the same head_dim and num_key_value_heads, and no other layer any"
        raise refusal("per_layer_config", found, rule, "Other layers of their own are not supported")
    names = {"head_dim": "head_dim", "num_key_value_heads": "n_kv_heads"}
    return {names[key]: n for key, n in ours.items()}


def _index(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdigit() and len(key) < 6 else key


def _shared(config: Config, types: list[str]) -> int:
    """Number of the last layers that borrow."""
    shared = config.take("num_kv_shared_layers", kind=int, default=0)
    if not 0 <= shared < len(types) or set(types[: len(types) - shared]) != set(types):
        rule = f"must leave a layer of each kind that makes its own keys, of {len(types)} layers"
        raise refusal("num_kv_shared_layers", shared, rule, "Correct the value in config.json")
    return shared


def _write_attention(decoder: Decoder, config: dict[str, Any]) -> None:
    blocks: list[Any] = [layer.attention for layer in decoder.layers]
    windows = [block.window for block in blocks]
    kinds = {FULL: blocks[windows.index(None)], SLIDING: next(b for b in blocks if b.window is not None)}
    borrowers = [block.borrows() is not None for block in blocks]
    full: Any = kinds[FULL]
    config |= {
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": kinds[SLIDING].window,
        "attention_k_eq_v": not full.projects_values,
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": None if full.projects_values else full.n_kv_heads,
        "num_kv_shared_layers": sum(borrowers),
    }
    nodes = {SLIDING: decoder.config["position"], FULL: decoder.config["position"]}
    for node in (decoder.config["variants"] or {}).get("attention", {}).values():
        nodes[FULL] = node.get("position") or nodes[FULL]
    config["rope_parameters"] = {kind: parameters(node, HABITS[kind]) for kind, node in nodes.items()}


# ---- feed-forward, and embeddings of each layer ----------------------------------------------------------------------


def _read_width(config: Config, model: dict[str, Any]) -> None:
    """Networks of borrowing layers twice as wide."""
    if not config.take("use_double_wide_mlp", kind=bool, default=False):
        return
    borrows = [source == "borrowed" for source in model["layout"]["kv_source"]]
    model["variants"]["ffn"] = {"wide": {"d_ff": 2 * model["ffn"]["d_ff"]}}
    model["layout"]["ffn"] = ["wide" if each else "ffn" for each in borrows]


def _write_width(decoder: Decoder, config: dict[str, Any]) -> None:
    config["use_double_wide_mlp"] = _width(decoder, 0) != _width(decoder, -1)


def _width(decoder: Decoder, index: int = 0) -> int:
    """Of a layer's dense network."""
    ffn: Any = decoder.layers[index].ffn
    return getattr(ffn, "dense", ffn).gate.out_features


def _read_experts(config: Config, model: dict[str, Any]) -> None:
    """Experts beside the dense network, which read the stream before its norm."""
    if not config.take("enable_moe_block", kind=bool, default=False):
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            config.take(key, default=None)
        return
    if "ffn" in model["layout"]:
        raise refusal("use_double_wide_mlp", True, "is not supported beside experts", "Correct config.json")
    sparse = {"name": "moe", "n_experts": config.take("num_experts", kind=int), "expert_norm": dict(model["norm"])}
    model["ffn"] = {"name": "side_by_side", "dense": model["ffn"], "sparse": sparse}
    model["gating"] = {"name": "normed_softmax", "top_k": config.take("top_k_experts", kind=int)}
    model["experts"] = {"name": "geglu", "d_ff": config.take("moe_intermediate_size", kind=int)}
    model["residual"] = {**model["residual"], "ffn_norm": "none"}


def _write_experts(decoder: Decoder, config: dict[str, Any]) -> None:
    ffn: Any = decoder.layers[0].ffn
    sparse: Any = getattr(ffn, "sparse", None)
    config["enable_moe_block"] = sparse is not None
    if sparse is not None:
        config |= {"num_experts": sparse.experts.n_experts, "top_k_experts": sparse.gating.top_k}
        config["moe_intermediate_size"] = sparse.experts.down.shape[2]


def _read_memory(config: Config, model: dict[str, Any]) -> None:
    """A row of each token for each layer."""
    width = config.take("hidden_size_per_layer_input", kind=int, default=256)
    rows = config.take("vocab_size_per_layer_input", kind=int, default=model["vocab_size"])
    if not width:
        return
    if rows != model["vocab_size"]:
        rule = f"must be vocab_size ({model['vocab_size']})"
        raise refusal("vocab_size_per_layer_input", rows, rule, "Tables of fewer tokens are not supported")
    model["memory"] = {"name": "per_layer_embedding", "width": width}


def _write_memory(decoder: Decoder, config: dict[str, Any]) -> None:
    memories: list[Any] = [layer.memory for layer in decoder.layers]
    config["hidden_size_per_layer_input"] = 0 if memories[0] is None else memories[0].table.embedding_dim
    config["vocab_size_per_layer_input"] = config["vocab_size"]
    norms = [memory.embedded_norm.weight for memory in memories if memory is not None]
    if any(not weight.is_meta and not torch.equal(weight, norms[0]) for weight in norms):
        raise AttributeError("embedded_norm differs between layers, and gemma4_text has one for all")


def _packed(decoder: Decoder) -> tuple[Row, ...]:
    """Tables and projections of all layers, side by side in one tensor of theirs; one norm for all."""
    n = len(decoder.layers)
    if getattr(decoder.layers[0], "memory", None) is None:
        return ()

    def columns(i: int) -> Form:
        def view(theirs: Tensor) -> Tensor:
            return theirs.chunk(n, 1)[i]

        return Form(view, lambda shape: (shape[0], n * shape[1]))

    rows: list[Row] = []
    for i in range(n):
        ours = f"layers.{i}.memory."
        rows += [
            Row(ours + "table.weight", "model.embed_tokens_per_layer.weight", form=columns(i)),
            Row(ours + "project.weight", "model.per_layer_model_projection.weight", form=one_of(n, i)),
            Row(ours + "embedded_norm.weight", "model.per_layer_projection_norm.weight"),
        ]
    return tuple(rows)


MEMORY = (
    Row("layers.{i}.memory.gate.weight", LAYER + "per_layer_input_gate.weight"),
    Row("layers.{i}.memory.output.weight", LAYER + "per_layer_projection.weight"),
    Row("layers.{i}.memory.output_norm.weight", LAYER + "post_per_layer_input_norm.weight"),
)

DENSE, SPARSE = "layers.{i}.ffn.dense", "layers.{i}.ffn.sparse."
EXPERTS = (
    *(Row(f"{DENSE}.{m}.weight", f"{LAYER}mlp.{m}_proj.weight") for m in ("gate", "up", "down")),
    Row(f"{DENSE}_norm.weight", LAYER + "pre_feedforward_layernorm.weight"),
    Row(f"{DENSE}_out_norm.weight", LAYER + "post_feedforward_layernorm_1.weight"),
    Row(SPARSE + "expert_norm.weight", LAYER + "pre_feedforward_layernorm_2.weight"),
    Row("layers.{i}.ffn.sparse_out_norm.weight", LAYER + "post_feedforward_layernorm_2.weight"),
    Row(SPARSE + "gating.weight", LAYER + "router.proj.weight"),
    Row(SPARSE + "gating.norm.weight", LAYER + "router.scale"),
    Row(SPARSE + "gating.gain", LAYER + "router.per_expert_scale"),
    Row(SPARSE + "experts.gate_up", LAYER + "experts.gate_up_proj"),
    Row(SPARSE + "experts.down", LAYER + "experts.down_proj"),
)

GEMMA4 = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    template={
        "attention": {},
        "ffn": {"name": "geglu"},
        "norm": {"name": "rmsnorm"},
        "residual": {"name": "scaled_sandwich"},
        "scale_embeddings": True,
    },
    settings=(
        *(*SIZES, *GIVEN_HEADS, Key("intermediate_size", "ffn.d_ff", _width), EPS, GELU_TANH, tied(True)),
        Part(_read_attention, _write_attention),
        Part(_read_width, _write_width),
        Part(_read_experts, _write_experts),
        Part(_read_memory, _write_memory),
        Key("final_logit_softcapping", "logit_softcap", lambda decoder: decoder.config["logit_softcap"], float, None),
        Fixed("attention_bias", False),
        Fixed("use_bidirectional_attention", None, also=("vision",)),
    ),
    names=(
        *(*FRAME, *NORM_ROWS, *ATTENTION, *QK_NORM, *GATED_FFN, *EXPERTS, *MEMORY),
        Row("layers.{i}.residual.scale", LAYER + "layer_scalar"),
    ),
    left_out=(r"model\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight",),
    sized=_packed,
)
