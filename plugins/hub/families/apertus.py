"""Apertus: Llama with xIELU in place of a gated network, a norm on each head, and other names of the layers' norms."""

from typing import Any

from blockwright.plugins.hub.config import Config, Fixed, Key, Part, refusal
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    BIASED,
    EPS,
    EVEN_HEADS,
    FRAME,
    LAYER,
    QK_NORM,
    SIZES,
    TEMPLATE,
    tied,
)
from blockwright.plugins.hub.names import Row
from blockwright.plugins.hub.rope import rope


def _require_positions(config: Config, model: dict[str, Any]) -> None:
    if not (config.values.get("rope_parameters") or config.values.get("rope_scaling")):
        rule = "is required: transformers would take Llama 3's positions with a factor of 8"
        raise refusal("rope_parameters", None, rule, "Write what the model was trained with")


FFN, ACTIVATION = "layers.{i}.ffn.", LAYER + "mlp.act_fn."

APERTUS = Family(
    model_type="apertus",
    architecture="ApertusForCausalLM",
    template={**TEMPLATE, "attention": {"name": "gqa", "qk_norm": {"name": "per_head"}}, "ffn": {"name": "xielu"}},
    settings=(
        *(*SIZES, *EVEN_HEADS, EPS, tied(), BIASED, rope("half_split", theta=1.2e7)),
        Part(_require_positions, lambda decoder, config: None),
        Key("intermediate_size", "ffn.d_ff", "first.ffn.up.out_features"),
        Fixed("hidden_act", "xielu"),
        Fixed("qk_norm", True, written=False),
        Fixed("post_norm", False, written=False),
        Fixed("mlp_bias", False, written=False),
    ),
    names=(
        *FRAME,
        Row("layers.{i}.residual.attention_norm.weight", LAYER + "attention_layernorm.weight"),
        Row("layers.{i}.residual.ffn_norm.weight", LAYER + "feedforward_layernorm.weight"),
        *(*ATTENTION, *QK_NORM),
        *(Row(f"{FFN}{matrix}.weight", f"{LAYER}mlp.{matrix}_proj.weight") for matrix in ("up", "down")),
        Row(FFN + "positive", ACTIVATION + "alpha_p"),
        Row(FFN + "negative", ACTIVATION + "alpha_n"),
        Row(FFN + "negative", ACTIVATION + "beta", constant=0.5),
        Row(FFN + "negative", ACTIVATION + "eps", constant=-1e-6),
    ),
)
