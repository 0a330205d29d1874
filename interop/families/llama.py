"""Llama 2 and 3, and models with their checkpoint format (DeepSeek 7B and 67B)."""

from blocks.decoder import Decoder
from interop.config import Fixed, Key, show
from interop.family import Family
from interop.llama_like import (
    ATTENTION,
    DIVIDED,
    EPS,
    FRAME,
    GATED_FFN,
    HEADS,
    PRENORM,
    SILU,
    SIZES,
    TABLES,
    TEMPLATE,
    WIDTH,
    tied,
)
from interop.rope import rope


def _has_bias(decoder: Decoder) -> bool:
    return show(decoder, "first.attention.query").bias is not None


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
        Key("attention_bias", "attention.bias", _has_bias, bool, False),
        Fixed("mlp_bias", False),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *GATED_FFN),
    left_out=TABLES,
)
