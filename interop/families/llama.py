"""Llama 2 and 3, and models with their checkpoint format (DeepSeek 7B and 67B)."""

from blockwright.interop.config import Fixed
from blockwright.interop.family import Family
from blockwright.interop.llama_like import (
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
from blockwright.interop.rope import rope

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
