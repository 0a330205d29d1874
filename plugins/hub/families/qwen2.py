"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and none on the output."""

from blockwright.plugins.hub.config import Fixed
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EVEN_HEADS,
    FRAME,
    GATED_FFN,
    PRENORM,
    SILU,
    SIZES,
    TEMPLATE,
    UNUSED_WINDOW,
    WIDTH,
    tied,
)
from blockwright.plugins.hub.rope import rope

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    template={**TEMPLATE, "attention": {"name": "gqa", "bias": True, "output_bias": False}},
    settings=(
        *(*SIZES, *EVEN_HEADS, WIDTH, EPS, SILU, tied(), rope("half_split"), UNUSED_WINDOW),
        Fixed("use_mrope", False, written=False),  # positions of pictures
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *GATED_FFN),
)
