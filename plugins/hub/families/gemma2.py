"""Gemma 2: gains stored minus one, norms around each mixer, soft caps, scaled embeddings, alternating windows."""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    DIVIDED,
    EPS,
    FRAME,
    GATED_FFN,
    GELU_TANH,
    HEADS,
    LAYER,
    SIZES,
    WIDTH,
    WINDOWS,
    tied,
)
from blockwright.plugins.hub.names import Row
from blockwright.plugins.hub.places import show
from blockwright.plugins.hub.rope import rope

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
        CAPS,
        QUERY_SCALE,
        Fixed("attention_bias", False),
        Fixed("use_bidirectional_attention", None, also=(False,)),
        Fixed("hidden_act", "gelu_pytorch_tanh", also=("gelu",), written=False),  # the old key, no longer read
    ),
    names=(*FRAME, *NORM_ROWS, *ATTENTION, *GATED_FFN),
)
