"""Mistral 7B: Llama's checkpoint format, with an attention window in the first release."""

from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
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
    WINDOW,
    tied,
)
from blockwright.plugins.hub.rope import rope

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    template=TEMPLATE,
    settings=(*SIZES, *HEADS, WIDTH, EPS, SILU, tied(), rope("half_split"), WINDOW),
    names=(*FRAME, *PRENORM, *ATTENTION, *GATED_FFN),
    left_out=TABLES,
)
