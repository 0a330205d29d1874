"""Gemma 2 and 3."""

from collections.abc import Mapping
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Key, Part, Unused, refusal, show
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    DIVIDED,
    EPS,
    FRAME,
    FULL,
    GATED_FFN,
    GELU_TANH,
    GIVEN_HEADS,
    HEADS,
    LAYER,
    QK_NORM,
    SIZES,
    SLIDING,
    WIDTH,
    WINDOWS,
    read_windows,
    tied,
    write_windows,
)
from blockwright.plugins.hub.names import Row
from blockwright.plugins.hub.rope import Habits, parameters, read_rope, rope
from blockwright.registry import ConfigError

# Gemma 2: gains stored minus one, norms around each mixer, soft caps, scaled embeddings, alternating windows.
_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_out_norm": "post_feedforward_layernorm",
}
NORM_ROWS = tuple(Row(f"layers.{{i}}.residual.{our}.weight", f"{LAYER}{their}.weight") for our, their in _NORMS.items())


def _read_caps(config: Config, model: dict[str, Any]) -> None:
    """Soft caps; null means none."""
    cap = config.take("attn_logit_softcapping", kind=float, default=None)
    if cap is not None:
        model["attention"]["scores"] = {"name": "softcap", "cap": cap}
    model["logit_softcap"] = config.take("final_logit_softcapping", kind=float, default=None)


def _write_caps(decoder: Decoder, config: dict[str, Any]) -> None:
    scores = show(decoder, "first.attention.scores")
    config["attn_logit_softcapping"] = None if scores is None else scores.cap
    config["final_logit_softcapping"] = decoder.config["logit_softcap"]


CAPS = Part(_read_caps, _write_caps)


def _query_scale(decoder: Decoder) -> int:
    attention: Any = decoder.layers[0].attention
    return round(attention.scale**-2)


QUERY_SCALE = Key("query_pre_attn_scalar", "attention.query_scale", _query_scale)

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    template={
        "attention": {"name": "sliding_window"},
        "ffn": {"name": "geglu"},
        "norm": {"name": "rmsnorm1p"},
        "residual": {"name": "sandwich"},
        "scale_embeddings": True,
    },
    settings=(
        *(*SIZES, *HEADS, DIVIDED, WIDTH, EPS, GELU_TANH, tied(True), rope("half_split"), WINDOWS),
        Given(("attn_logit_softcapping", "final_logit_softcapping"), none=True),  # 50 and 30 in the class
        CAPS,
        QUERY_SCALE,
        Fixed("attention_bias", False),
        Fixed("use_bidirectional_attention", None, also=(False,)),
        Fixed("hidden_act", "gelu_pytorch_tanh", also=("gelu",), written=False),  # the old key, no longer read
    ),
    names=(*FRAME, *NORM_ROWS, *ATTENTION, *GATED_FFN),
)


# Gemma 3, text: Gemma 2 without soft caps, with norms on queries and keys, and positions of their own in full layers.
#
# Read from checkpoints of text models (``gemma3_text``); those of ``gemma3``, with a vision tower, are not.
HABITS = {FULL: Habits("half_split", theta=1e6), SLIDING: Habits("half_split", theta=1e4)}


def _read_positions(config: Config, model: dict[str, Any]) -> None:
    """Windows, and the positions of both kinds of layers; older files have those of the windows in a key of its own."""
    every = config.take("sliding_window_pattern", kind=int, default=6)
    if every < 1:
        raise refusal("sliding_window_pattern", every, "must be at least 1", "Correct the value in config.json")
    read_windows(config, model, every)
    given = config.take("rope_parameters", kind=dict, default={})
    scaling = config.take("rope_scaling", kind=dict, default={})
    older = {
        FULL: {"rope_theta": config.take("rope_theta", default=None), **scaling},
        SLIDING: {"rope_theta": config.take("rope_local_base_freq", default=None)},
    }
    if given and (given.keys() - HABITS.keys() or any(older[FULL].values()) or any(older[SLIDING].values())):
        rule = f"must have the keys {FULL} and {SLIDING}, and no older keys beside it"
        raise refusal("rope_parameters", given, rule, "Keep those that the model was trained with")
    positions = positions_of_kinds(config, {kind: given.get(kind) or older[kind] for kind in HABITS}, HABITS)
    model["position"] = positions[SLIDING]
    model["variants"]["attention"]["full"]["position"] = positions[FULL]


def positions_of_kinds(
    config: Config, given: Mapping[str, Any], habits: Mapping[str, Habits]
) -> dict[str, dict[str, Any]]:
    """The position node of each kind of layer.

    Args:
        config: of the whole model
        given: kind → its rope_parameters
        habits: the same kinds → what these mean

    Raises:
        ConfigError: as ``read_rope``
    """
    positions = {}
    for kind, own in given.items():
        inner = Config({**config.values, "rope_theta": None, "rope_scaling": None, "rope_parameters": own})
        try:
            positions[kind] = read_rope(inner, habits[kind])
        except ConfigError as error:
            path = error.path.replace("rope_parameters.", f"rope_parameters.{kind}.")
            raise ConfigError(path, error.value, error.rule, error.remedy) from None
    return positions


def _write_positions(decoder: Decoder, config: dict[str, Any]) -> None:
    write_windows(decoder, config)
    nodes = dict.fromkeys(HABITS, decoder.config["position"])
    for node in (decoder.config["variants"] or {}).get("attention", {}).values():
        if node.get("window", 0) is None:
            nodes[FULL] = node.get("position") or nodes[FULL]
    config["rope_parameters"] = {kind: parameters(node, HABITS[kind]) for kind, node in nodes.items()}


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    template={
        "attention": {"name": "sliding_window", "qk_norm": {"name": "per_head"}},
        "ffn": {"name": "geglu"},
        "norm": {"name": "rmsnorm1p"},
        "residual": {"name": "sandwich"},
        "scale_embeddings": True,
    },
    settings=(
        *(*SIZES, *GIVEN_HEADS, DIVIDED, WIDTH, EPS, GELU_TANH, tied(True), CAPS, QUERY_SCALE),
        Part(_read_positions, _write_positions),
        Fixed("attention_bias", False),
        Fixed("use_bidirectional_attention", False),
        Unused("_sliding_window_pattern"),  # written beside layer_types, which decides
    ),
    names=(*FRAME, *NORM_ROWS, *ATTENTION, *QK_NORM, *GATED_FFN),
)
