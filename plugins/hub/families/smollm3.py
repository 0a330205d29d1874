"""SmolLM3: Llama, with no positions in every fourth layer."""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.position.base import NoPosition
from blockwright.plugins.hub.config import Config, Fixed, Part, refusal
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    BIASED,
    EPS,
    EVEN_HEADS,
    FRAME,
    GATED_FFN,
    GIVEN_HEADS,
    PRENORM,
    SILU,
    SIZES,
    TEMPLATE,
    UNUSED_WINDOW,
    WIDTH,
    tied,
)
from blockwright.plugins.hub.rope import rope


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
