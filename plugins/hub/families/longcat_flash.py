"""LongCat-Flash: each of its layers is two of ours, and its experts, some without parameters, join the second one.

Latents of queries and keys are scaled to the model's width. The head of multi-token prediction is left out. Released
files hold no tensors of the experts without parameters; transformers 5.24 saves rows for them that nothing reads, and
does not load a folder without those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Setting, Unused, refusal, show
from blockwright.plugins.hub.deepseek_like import LATENT, LATENT_NORM, LATENT_SIZES
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import EPS, FRAME, MIXTURE, SILU, SIZES, TABLES, tied
from blockwright.plugins.hub.names import Row, expert_gate, expert_up, one_expert
from blockwright.plugins.hub.rope import rope

LAYER = "model.layers.{i/2}."
OURS, EXPERTS = "layers.{i}.ffn.later.", LAYER + "mlp.experts.{e}."
SCALED = {**LATENT_NORM, "name": "scale_corrected"}

# ---- settings --------------------------------------------------------------------------------------------------------


def _read_depth(config: Config, model: dict[str, Any]) -> None:
    n = config.take("num_layers", kind=int)
    model["n_layers"], model["layout"] = 2 * n, {"ffn": ["ffn", "closing"] * n}


def _write_depth(decoder: Decoder, config: dict[str, Any]) -> None:
    config["num_layers"] = len(decoder.layers) // 2


def _read_widths(config: Config, model: dict[str, Any]) -> None:
    d_ff = config.take("ffn_hidden_size", "intermediate_size", kind=int)
    routed, idle = config.take("n_routed_experts", kind=int), config.take("zero_expert_num", kind=int, default=0)
    if idle < 0:
        raise refusal("zero_expert_num", idle, "must not be negative", "Correct the value in config.json")
    experts = {"name": "swiglu", "d_ff": config.take("expert_ffn_hidden_size", "moe_intermediate_size", kind=int)}
    model["ffn"]["now"]["d_ff"] = model["variants"]["ffn"]["closing"]["now"]["d_ff"] = d_ff
    model["ffn"]["later"]["n_experts"] = routed + idle
    model["experts"] = {"name": "with_identity", "n_idle": idle, "experts": experts} if idle else experts


def _write_widths(decoder: Decoder, config: dict[str, Any]) -> None:
    experts, total = show(decoder, "first.ffn.later.experts"), show(decoder, "first.ffn.later.gating.n_experts")
    inner = getattr(experts, "experts", experts)
    config["ffn_hidden_size"] = show(decoder, "first.ffn.now.gate.out_features")
    config["expert_ffn_hidden_size"] = inner.down.shape[2]
    config |= {"n_routed_experts": len(inner.down), "zero_expert_num": total - len(inner.down)}
    config["head_dim"] = show(decoder, "first.attention.rope")  # by which transformers rotates


LATER = "first.ffn.later.gating."
GATE: tuple[Setting, ...] = (
    Key("moe_topk", "gating.top_k", LATER + "top_k", also=("num_experts_per_tok",)),
    Key("routed_scaling_factor", "gating.scaling", LATER + "scaling", float),
    Fixed("norm_topk_prob", False, written=False),
    Fixed("router_bias", False, written=False),
    Fixed("zero_expert_type", "identity", written=False),
)

# ---- names -----------------------------------------------------------------------------------------------------------


def _of_two(row: Row) -> Row:
    """A row of an attention of ours, of which their layer has two."""
    return replace(row, theirs=row.theirs.replace("model.layers.{i}.self_attn.", LAYER + "self_attn.{i%2}."))


NETWORK = tuple(
    Row(f"layers.{{i}}.ffn.now.{m}.weight", f"{LAYER}mlps.{{i%2}}.{m}_proj.weight") for m in ("gate", "up", "down")
)


def _experts(ours: str) -> tuple[Row, ...]:
    return (
        Row(ours + "gate_up", EXPERTS + "gate_proj.weight", expert_gate),
        Row(ours + "gate_up", EXPERTS + "up_proj.weight", expert_up),
        Row(ours + "down", EXPERTS + "down_proj.weight", one_expert),
    )


LONGCAT_FLASH = Family(
    model_type="longcat_flash",
    architecture="LongcatFlashForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "mla", "q_norm": SCALED, "kv_norm": SCALED},
        "ffn": {"name": "shortcut", "now": {"name": "swiglu"}, "later": {"name": "moe"}},
        "gating": {"name": "softmax_bias", "renormalise": False},
        "variants": {"ffn": {"closing": {"name": "shortcut", "now": {"name": "swiglu"}}}},
    },
    settings=(
        *(*SIZES[:2], SIZES[3], *LATENT_SIZES, EPS, SILU, tied()),
        rope("interleaved", sharpened=True, theta=10_000_000.0),
        Part(_read_depth, _write_depth),
        Part(_read_widths, _write_widths),
        *GATE,
        Fixed("attention_method", "MLA", written=False),
        *(Fixed(key, True, written=False) for key in ("mla_scale_q_lora", "mla_scale_kv_lora")),
        *(Unused(key) for key in ("num_nextn_predict_layers", "mtp_num_layers")),
    ),
    names=(
        *FRAME,
        Row("layers.{i}.residual.attention_norm.weight", LAYER + "input_layernorm.{i%2}.weight"),
        Row("layers.{i}.residual.ffn_norm.weight", LAYER + "post_attention_layernorm.{i%2}.weight"),
        *map(_of_two, LATENT),
        *NETWORK,
        Row(OURS + "gating.weight", LAYER + "mlp.router.classifier.weight"),
        Row(OURS + "gating.bias", LAYER + "mlp.router.e_score_correction_bias"),
        Row(OURS + "gating.moved", ""),
        *_experts(OURS + "experts."),
        *_experts(OURS + "experts.experts."),
    ),
    left_out=(*TABLES, r"model\.mtp\..*", r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj\.weight"),
)
