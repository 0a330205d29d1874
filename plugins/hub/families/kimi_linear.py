"""Kimi-Linear: delta layers with a decay for each channel, latent attention without positions, DeepSeek-V3's experts.

Keys of config.json are those of the released files; transformers saves others, which are read too.
"""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Unused, refusal, show
from blockwright.plugins.hub.deepseek_like import CHOICE_BIAS, LATENT, LATENT_NORM, LATENT_SIZES
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.hybrid_like import DELTA, LINEAR, kda, read_mixers, taps, types
from blockwright.plugins.hub.llama_like import (
    EPS,
    FRAME,
    FULL,
    LAYER,
    MIXTURE,
    PRENORM,
    SILU,
    SIZES,
    expert_width,
    n_experts,
    read_types,
    tied,
)
from blockwright.plugins.hub.names import BROADCAST, Row, beside, expert_gate, expert_up, one_expert

MOE = LAYER + "block_sparse_moe."
MATRICES = ("gate", "up", "down")

# ---- settings --------------------------------------------------------------------------------------------------------

# key of linear_attn_config → of transformers, and ours
WIDTHS = {
    "num_heads": ("linear_num_heads", "n_heads"),
    "head_dim": ("linear_head_dim", "head_dim"),
    "short_conv_kernel_size": ("linear_conv_kernel_dim", "taps"),
}
LISTS = {"full_attn_layers": FULL, "kda_layers": LINEAR}


def _read_mixers(config: Config, model: dict[str, Any]) -> None:
    inner, depth = config.take("linear_attn_config", kind=dict, default={}), model["n_layers"]
    variant = model["variants"]["attention"]["linear"]
    for key, (flat, ours) in WIDTHS.items():
        values = {f"linear_attn_config.{key}": inner.get(key), flat: config.take(flat, default=None)}
        variant[ours] = Config(values).take(f"linear_attn_config.{key}", flat, kind=int)
    if unknown := sorted(inner.keys() - WIDTHS.keys() - LISTS.keys()):
        key = f"linear_attn_config.{unknown[0]}"
        raise refusal(key, inner[unknown[0]], "is not known", f"Known: {', '.join([*WIDTHS, *LISTS])}")
    listed = {kind: inner[key] for key, kind in LISTS.items() if isinstance(inner.get(key), list)}
    pairs = [(i, kind) for kind, layers in listed.items() for i in layers]
    if inner and sorted(str(i) for i, _ in pairs) != sorted(map(str, range(1, depth + 1))):
        rule = f"full_attn_layers and kda_layers must number the {depth} layers from 1, each once"
        raise refusal("linear_attn_config", inner, rule, "Correct the lists in config.json")
    numbered = dict(pairs)
    given = [numbered.get(i + 1) for i in range(depth)] if inner else None
    found = read_types(config, model, (FULL, LINEAR), lambda i: numbered.get(i + 1, ""))
    if given is not None and found != given:
        raise refusal("layer_types", found, "contradicts linear_attn_config", "Keep what the model was trained with")
    read_mixers(found, model)


def _write_mixers(decoder: Decoder, config: dict[str, Any]) -> None:
    kinds, mixer = types(decoder), show(decoder, "linear.attention")
    widths = {"num_heads": mixer.value.out_features // mixer.v_head_dim, "head_dim": mixer.head_dim}
    lists = {key: [i for i, kind in enumerate(kinds, 1) if kind == name] for key, name in LISTS.items()}
    config["linear_attn_config"] = {**widths, "short_conv_kernel_size": taps(decoder), **lists}


def read_layers(config: Config, model: dict[str, Any]) -> None:
    """Which layers are dense, and the width of the shared experts together."""
    depth, leading = model["n_layers"], config.take("first_k_dense_replace", kind=int, default=None)
    kinds = config.take("mlp_layer_types", kind=list, default=None)
    by_number = None if leading is None else ["dense" if i < leading else "sparse" for i in range(depth)]
    kinds = by_number if kinds is None else kinds
    if kinds is None or len(kinds) != depth or {*map(str, kinds)} - {"dense", "sparse"} or "sparse" not in kinds:
        rule = f"must name dense or sparse for each of the {depth} layers, and sparse for some"
        raise refusal("mlp_layer_types", kinds, rule, "Write it, or first_k_dense_replace")
    if by_number not in (None, kinds):
        raise refusal("first_k_dense_replace", leading, "contradicts mlp_layer_types", "Keep one of them")
    width, shared = (
        config.take("moe_intermediate_size", kind=int),
        config.take("num_shared_experts", "n_shared_experts"),
    )
    d_ff = config.take("intermediate_size", kind=int)
    if type(shared) is not int or shared < 1:
        raise refusal("num_shared_experts", shared, "must be at least 1", "Correct the value in config.json")
    model["ffn"]["shared"] = {"name": "swiglu", "d_ff": shared * width}
    if "dense" in kinds:
        model["variants"]["ffn"] = {"dense": {"name": "swiglu", "d_ff": d_ff}}
        model["layout"] = {"ffn": ["dense" if kind == "dense" else "ffn" for kind in kinds]}


def write_layers(decoder: Decoder, config: dict[str, Any]) -> None:
    kinds = ["sparse" if hasattr(layer.ffn, "gating") else "dense" for layer in decoder.layers]
    config["first_k_dense_replace"] = kinds.index("sparse")
    if "dense" in kinds[kinds.index("sparse") :]:
        raise AttributeError("dense layers behind routed ones")
    dense = show(decoder, "dense.ffn.gate.out_features") if "dense" in kinds else expert_width(decoder)
    config["intermediate_size"] = dense
    config["num_shared_experts"] = show(decoder, "sparse.ffn.shared.gate.out_features") // expert_width(decoder)


GATING = "sparse.ffn.gating."
GATE = (
    Key("num_experts_per_token", "gating.top_k", GATING + "top_k", also=("num_experts_per_tok",)),
    Key("moe_renormalize", "gating.renormalise", GATING + "renormalise", bool, True, also=("norm_topk_prob",)),
    Key("routed_scaling_factor", "gating.scaling", GATING + "scaling", float),
    Key("num_expert_group", "gating.n_groups", GATING + "n_groups", default=1, also=("n_group",)),
    Key("topk_group", "gating.top_groups", GATING + "top_groups", default=1),
    Fixed("moe_router_activation_func", "sigmoid"),
    Unused("use_grouped_topk"),  # one group is none
)

# ---- names -----------------------------------------------------------------------------------------------------------

FFN = (
    # transformers saves a dense layer under the name of the routed ones
    *(
        Row(f"layers.{{i}}.ffn.{m}.weight", f"{LAYER}mlp.{m}_proj.weight", also=f"{MOE}{m}_proj.weight")
        for m in MATRICES
    ),
    *(Row(f"layers.{{i}}.ffn.shared.{m}.weight", f"{MOE}shared_experts.{m}_proj.weight") for m in MATRICES),
    Row("layers.{i}.ffn.gating.weight", MOE + "gate.weight"),
    Row("layers.{i}.ffn.gating.bias", MOE + "gate.e_score_correction_bias"),
    CHOICE_BIAS[1],
    Row("layers.{i}.ffn.experts.gate_up", MOE + "experts.{e}.w1.weight", expert_gate),
    Row("layers.{i}.ffn.experts.gate_up", MOE + "experts.{e}.w3.weight", expert_up),
    Row("layers.{i}.ffn.experts.down", MOE + "experts.{e}.w2.weight", one_expert),
)
KDA = (*kda(LAYER + "self_attn."), Row(DELTA, LAYER + "self_attn.A_log", form=BROADCAST))

KIMI_LINEAR = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "mla", "q_norm": LATENT_NORM, "kv_norm": LATENT_NORM},
        "position": "none",
        "gating": {"name": "sigmoid_bias"},
        "variants": {"attention": {"linear": {"name": "kda"}}},
    },
    settings=(
        *(*SIZES[:3], *LATENT_SIZES, EPS, SILU, tied()),
        Key("model_max_length", "max_positions", SIZES[3].shown, also=("max_position_embeddings",)),
        Key("moe_intermediate_size", "experts.d_ff", expert_width),
        Key("num_experts", "ffn.n_experts", n_experts, also=("num_local_experts",)),
        Part(read_layers, write_layers),
        Part(_read_mixers, _write_mixers),
        *GATE,
        Fixed("mla_use_nope", True),
        Fixed("moe_layer_freq", 1),
        Fixed("num_nextn_predict_layers", 0, written=False),
        *(Unused(key) for key in ("rope_theta", "rope_scaling", "rope_parameters")),  # nothing turns
    ),
    names=(*FRAME, *PRENORM, *FFN, *beside("!" + DELTA, LATENT), *beside(DELTA, KDA)),
)
