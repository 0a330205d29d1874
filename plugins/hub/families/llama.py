"""Llama, and two that differ from it by little: SmolLM3 and Apertus."""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.position.base import NoPosition
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, refusal
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    BIASED,
    DIVIDED,
    EPS,
    EVEN_HEADS,
    FRAME,
    GATED_FFN,
    GIVEN_HEADS,
    HEADS,
    LAYER,
    PRENORM,
    QK_NORM,
    SILU,
    SIZES,
    TABLES,
    TEMPLATE,
    UNUSED_WINDOW,
    WIDTH,
    tied,
)
from blockwright.plugins.hub.names import Row
from blockwright.plugins.hub.rope import required, rope

# Llama 2 and 3, and models with their checkpoint format (DeepSeek 7B and 67B).
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    template=TEMPLATE,
    settings=(
        *SIZES,
        *HEADS,
        DIVIDED,
        WIDTH,
        EPS,
        SILU,
        tied(),
        rope("half_split"),
        BIASED,
        Fixed("mlp_bias", False),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *GATED_FFN),
    left_out=TABLES,
)


# SmolLM3: Llama, with no positions in every fourth layer.


def _read_turned(config: Config, model: dict[str, Any]) -> None:
    """Which layers have positions; without a list, all but each ``no_rope_layer_interval``-th."""
    every, depth = config.take("no_rope_layer_interval", kind=int, default=4), model["n_layers"]
    turned = config.take("no_rope_layers", kind=list, default=None)
    if turned is None:
        if every < 1:
            raise refusal("no_rope_layer_interval", every, "must be at least 1", "Correct the value in config.json")
        turned = [int((i + 1) % every != 0) for i in range(depth)]
    if len(turned) < depth or not all(t in (0, 1) for t in turned) or not any(turned[:depth]):
        rule = f"must have a 1 or a 0 for each of the {depth} layers, and a 1 for some"
        raise refusal("no_rope_layers", turned, rule, "Correct the list in config.json")
    model["layout"] = {"position": ["position" if t else "none" for t in turned[:depth]]}


def _write_turned(decoder: Decoder, config: dict[str, Any]) -> None:
    attentions: Any = [layer.attention for layer in decoder.layers]
    config["no_rope_layers"] = [int(not isinstance(attention.position, NoPosition)) for attention in attentions]


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    template=TEMPLATE,
    settings=(
        *(*SIZES, GIVEN_HEADS[0], GIVEN_HEADS[1], EVEN_HEADS[2], WIDTH, EPS, SILU, tied(True), BIASED, UNUSED_WINDOW),
        rope("half_split", theta=2e6),
        Part(_read_turned, _write_turned),
        Fixed("mlp_bias", False),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *GATED_FFN),
)


# Apertus: Llama with xIELU in place of a gated network, a norm on each head, and other names of the layers' norms.


FFN, ACTIVATION = "layers.{i}.ffn.", LAYER + "mlp.act_fn."

APERTUS = Family(
    model_type="apertus",
    architecture="ApertusForCausalLM",
    template={**TEMPLATE, "attention": {"name": "gqa", "qk_norm": {"name": "per_head"}}, "ffn": {"name": "xielu"}},
    settings=(
        *(*SIZES, *EVEN_HEADS, EPS, tied(), BIASED, rope("half_split", theta=1.2e7)),
        required("transformers would take Llama 3's positions with a factor of 8"),
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
