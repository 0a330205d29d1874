"""Qwen3, dense: a norm on each head of queries and keys, and no biases."""

from blockwright.plugins.hub.config import Fixed
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    FRAME,
    GATED_FFN,
    HEADS,
    PRENORM,
    QK_NORM,
    SILU,
    SIZES,
    TEMPLATE,
    UNUSED_WINDOW,
    WIDTH,
    tied,
)
from blockwright.plugins.hub.rope import rope

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    template={**TEMPLATE, "attention": {"name": "gqa", "qk_norm": {"name": "per_head"}}},
    settings=(
        *(*SIZES, *HEADS, WIDTH, EPS, SILU, tied(), rope("half_split"), UNUSED_WINDOW),
        Fixed("attention_bias", False),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *QK_NORM, *GATED_FFN),
)
