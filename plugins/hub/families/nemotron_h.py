"""Nemotron-H and Nemotron 3: each layer is Mamba-2, attention, an MLP or a mixture, with one norm.

Projections of Mamba-2 are fused; routed experts may work in a latent.

Not supported: heads of multi-token prediction, which are left out, and the limits of time steps that the first released
code read from ``time_step_limit``: as in transformers, steps are at least ``time_step_min``.
"""

from typing import Any

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Unused, refusal, show, sparse
from blockwright.plugins.hub.deepseek_like import CHOICE_BIAS
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.hybrid_like import LINEAR, OURS, taps
from blockwright.plugins.hub.llama_like import ATTENTION, FULL, SIZES, n_heads, tied
from blockwright.plugins.hub.names import Row, beside, block, one_expert

BLOCK, MIXER = "backbone.layers.{i}.", "backbone.layers.{i}.mixer."
MAMBA = OURS + "log_rate"  # what only a Mamba-2 layer has
LETTERS = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}
OLDER = {"mamba": LINEAR, "attention": FULL}
# kind of layer → the blocks in its slots, as in the layout
SLOTS = {
    LINEAR: {"attention": "attention", "ffn": "none", "residual": "residual"},
    FULL: {"attention": "full", "ffn": "none", "residual": "residual"},
    "mlp": {"attention": "none", "ffn": "ffn", "residual": "mlp"},
    "moe": {"attention": "none", "ffn": "ffn", "residual": "mlp"},
}
BESIDE_MOE = {**SLOTS, "mlp": {**SLOTS["mlp"], "ffn": "dense"}}


def _read_kinds(config: Config, model: dict[str, Any]) -> None:
    kinds = config.take("layers_block_type", "layer_types", kind=list, default=None)
    pattern = config.take("hybrid_override_pattern", kind=str, default=None)
    spelt = None if pattern is None else [LETTERS.get(letter, letter) for letter in pattern]
    kinds = spelt if kinds is None else [OLDER.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    depth = config.take("num_hidden_layers", kind=int, default=len(kinds or ()))
    if spelt not in (None, kinds) or kinds is None or len(kinds) != depth:
        rule = f"must have a letter for each of the {depth} layers, and agree with layers_block_type"
        raise refusal("hybrid_override_pattern", pattern, rule, "Keep the one that the model was trained with")
    known = ", ".join(SLOTS)
    if unknown := [kind for kind in kinds if not isinstance(kind, str) or kind not in SLOTS]:
        raise refusal("layers_block_type", unknown[0], "is not supported", f"Known: {known}")
    if LINEAR not in kinds or not {"mlp", "moe"} & {*kinds}:
        rule = f"must name {LINEAR} for some layer, and mlp or moe for another"
        raise refusal("layers_block_type", kinds, rule, f"Known: {known}")
    slots = BESIDE_MOE if "moe" in kinds else SLOTS
    model["n_layers"] = depth
    model["layout"] = {slot: [slots[kind][slot] for kind in kinds] for slot in ("attention", "ffn", "residual")}
    mlp = {"name": "relu2", "d_ff": config.take("intermediate_size", kind=int)} if "mlp" in kinds else None
    if "moe" in kinds:
        model |= _read_mixture(config)
        model["variants"] |= {} if mlp is None else {"ffn": {"dense": mlp}}
    else:
        model["ffn"] = mlp


def _read_mixture(config: Config) -> dict[str, Any]:
    """The nodes of layers with experts."""
    if (shared := config.take("n_shared_experts", kind=int, default=1)) != 1:
        rule = "must be 1, of width moe_shared_expert_intermediate_size"
        raise refusal("n_shared_experts", shared, rule, "Released checkpoints have one")
    width = config.take("moe_shared_expert_intermediate_size", kind=int)
    n_experts = config.take("n_routed_experts", "num_local_experts", kind=int)
    gating = {
        "name": "sigmoid_bias",
        "top_k": config.take("num_experts_per_tok", kind=int),
        "n_groups": config.take("n_group", kind=int, default=1),
        "top_groups": config.take("topk_group", kind=int, default=1),
        "renormalise": config.take("norm_topk_prob", kind=bool, default=True),
        "scaling": config.take("routed_scaling_factor", kind=float, default=1.0),
    }
    experts: dict[str, Any] = {"name": "relu2", "d_ff": config.take("moe_intermediate_size", kind=int)}
    latent = config.take("moe_latent_size", kind=int, default=None)
    if latent is not None:
        experts = {"name": "latent", "width": latent, "experts": experts}
    ffn = {"name": "moe", "n_experts": n_experts, "shared": {"name": "relu2", "d_ff": width}}
    return {"ffn": ffn, "gating": gating, "experts": experts}


def _kind(layer: Any) -> str:
    if not isinstance(layer.attention, Recurrent):
        return FULL
    if not getattr(layer.attention, "empty", False):
        return LINEAR
    return "moe" if hasattr(layer.ffn, "gating") else "mlp"


def _write_kinds(decoder: Decoder, config: dict[str, Any]) -> None:
    kinds, letters = [_kind(layer) for layer in decoder.layers], {kind: letter for letter, kind in LETTERS.items()}
    config["num_hidden_layers"], config["layers_block_type"] = len(kinds), kinds
    config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)  # read by transformers before 5
    if "mlp" in kinds:
        config["intermediate_size"] = decoder.layers[kinds.index("mlp")].ffn.up.out_features  # type: ignore[union-attr]
    if "moe" in kinds:
        config |= _mixture(sparse(decoder).ffn)


def _mixture(ffn: Any) -> dict[str, Any]:
    gating, latent = ffn.gating, getattr(ffn.experts, "experts", None)
    return {
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": ffn.shared.up.out_features,
        "n_routed_experts": gating.n_experts,
        "num_experts_per_tok": gating.top_k,
        "n_group": gating.n_groups,
        "topk_group": gating.top_groups,
        "norm_topk_prob": gating.renormalise,
        "routed_scaling_factor": gating.scaling,
        "moe_intermediate_size": (ffn.experts if latent is None else latent).down.shape[2],
        "moe_latent_size": None if latent is None else ffn.experts.down.out_features,
    }


def _read_limits(config: Config, model: dict[str, Any]) -> None:
    limits = config.take("time_step_limit", kind=list, default=[0.0, None])
    infinite = limits[1:] in ([None], [float("inf")], [{"__float__": "Infinity"}])
    if limits[:1] != [0.0] or not infinite:
        raise refusal("time_step_limit", limits, "must be 0 and infinity: others are not implemented", "Leave it out")
    model["attention"]["eps"] = model["norm"]["eps"]


def _groups(decoder: Decoder) -> int:
    mixer: Any = show(decoder, "linear.attention")
    return len(mixer.skip) // mixer.shared_by


def _fused(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of the input projection, [gate|x|B|C|Δ], and of the convolution, [x|B|C]."""
    mixer: Any = show(decoder, "linear.attention")
    widths = {name: mixer.get_submodule(name).out_features for name in ("gate", "value", "key", "query", "time")}
    names, sizes = list(widths), list(widths.values())
    convolved = range(1, 4)
    return beside(
        MAMBA,
        (
            *(Row(f"{OURS}{names[n]}.weight", MIXER + "in_proj.weight", **block(sizes, n)) for n in range(5)),
            *(
                Row(f"{OURS}{names[n]}_conv.{leaf}", f"{MIXER}conv1d.{leaf}", **block(sizes[1:4], n - 1, taps=by_tap))
                for n in convolved
                for leaf, by_tap in (("weight", True), ("bias", False))
            ),
        ),
    )


MLP = ("up", "down")
FULL_LAYER = "variants.attention.full."
ROUTED = """n_routed_experts num_local_experts n_shared_experts moe_intermediate_size moe_latent_size
    moe_shared_expert_intermediate_size num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob"""
AT_START = "time_step_max time_step_floor rescale_prenorm_residual hidden_dropout"
PREDICTION = "num_nextn_predict_layers mtp_layers_block_type mtp_hybrid_override_pattern"
OF_PROGRAMS = """moe_shared_expert_overlap chunk_size expand use_mamba_kernels mamba_ssm_cache_dtype
    num_logits_to_keep residual_in_fp32"""

NEMOTRON_H = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    template={
        "attention": {"name": "mamba2"},
        "position": "none",
        "norm": {"name": "rmsnorm"},
        "residual": {"name": "prenorm", "ffn_norm": "none"},
        "variants": {
            "attention": {"full": {"name": "gqa"}},
            "residual": {"mlp": {"name": "prenorm", "attention_norm": "none"}},
        },
    },
    settings=(
        *(*SIZES[:2], SIZES[3], tied()),
        Part(_read_kinds, _write_kinds),
        Key("layer_norm_epsilon", "norm.eps", "norm.eps", float),
        Part(_read_limits, lambda decoder, config: None),
        Key("mamba_num_heads", "attention.n_heads", lambda decoder: len(show(decoder, "linear.attention.skip"))),
        Key("mamba_head_dim", "attention.head_dim", "linear.attention.head_dim"),
        Key("ssm_state_size", "attention.state_dim", "linear.attention.state_dim"),
        Key("n_groups", "attention.n_groups", _groups, also=("mamba_n_groups",)),
        Key("conv_kernel", "attention.taps", taps, also=("mamba_d_conv",)),
        Key("time_step_min", "attention.least_step", "linear.attention.least_step", float, also=("mamba_dt_min",)),
        Key("num_attention_heads", FULL_LAYER + "n_heads", n_heads),
        Key("num_key_value_heads", FULL_LAYER + "n_kv_heads", "full.attention.n_kv_heads"),
        Key("head_dim", FULL_LAYER + "head_dim", "full.attention.head_dim", also=("attention_head_dim",)),
        Fixed("mlp_hidden_act", "relu2"),
        Fixed("mamba_hidden_act", "silu"),
        Fixed("use_conv_bias", True),
        *(Fixed(key, False) for key in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")),
        # without a layer that they describe, these are defaults of transformers
        *(
            Unused(key)
            for key in f"intermediate_size {ROUTED} {PREDICTION} {AT_START} {OF_PROGRAMS} rope_theta".split()
        ),
    ),
    names=(
        Row("embedding.weight", "backbone.embeddings.weight"),
        Row("norm.weight", "backbone.norm_f.weight"),
        Row("head.weight", "lm_head.weight"),
        *(Row(f"layers.{{i}}.residual.{slot}_norm.weight", BLOCK + "norm.weight") for slot in ("attention", "ffn")),
        *(Row(f"layers.{{i}}.ffn.{m}.weight", f"{MIXER}{m}_proj.weight") for m in MLP),
        *(Row(f"layers.{{i}}.ffn.shared.{m}.weight", f"{MIXER}shared_experts.{m}_proj.weight") for m in MLP),
        Row("layers.{i}.ffn.gating.weight", MIXER + "gate.weight"),
        Row("layers.{i}.ffn.gating.bias", MIXER + "gate.e_score_correction_bias"),
        CHOICE_BIAS[1],
        *(
            Row(f"layers.{{i}}.ffn.{place}.{m}", f"{MIXER}experts.{{e}}.{m}_proj.weight", one_expert)
            for place in ("experts", "experts.experts")
            for m in MLP
        ),
        Row("layers.{i}.ffn.experts.down.weight", MIXER + "fc1_latent_proj.weight"),
        Row("layers.{i}.ffn.experts.up.weight", MIXER + "fc2_latent_proj.weight"),
        *beside(
            "!" + MAMBA, (Row(row.ours, row.theirs.replace("model.layers.{i}.self_attn.", MIXER)) for row in ATTENTION)
        ),
        Row(MAMBA, MIXER + "A_log"),
        Row(OURS + "time_bias", MIXER + "dt_bias"),
        Row(OURS + "skip", MIXER + "D"),
        Row(OURS + "weight", MIXER + "norm.weight"),
        *beside(MAMBA, (Row(OURS + "output.weight", MIXER + "out_proj.weight"),)),
    ),
    left_out=(r"mtp\..*",),
    sized=_fused,
    prefix="backbone.",
)
