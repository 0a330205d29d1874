"""Llama 2 and 3, and models with their checkpoint format (DeepSeek 7B and 67B)."""

from blockwright.plugins.hub.config import Fixed
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    BIASED,
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
from blockwright.plugins.hub.rope import rope

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
