"""OLMo 2: norms after the mixers, and one over all queries and one over all keys."""

from blockwright.plugins.hub.config import Fixed
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EVEN_HEADS,
    FRAME,
    GATED_FFN,
    LAYER,
    QK_NORM,
    SILU,
    SIZES,
    TEMPLATE,
    WIDTH,
    tied,
)
from blockwright.plugins.hub.names import Row
from blockwright.plugins.hub.rope import rope

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    template={
        **TEMPLATE,
        "attention": {"name": "gqa", "qk_norm": {"name": "full"}},
        "residual": {"name": "reordered"},
    },
    settings=(
        *(*SIZES, *EVEN_HEADS, WIDTH, EPS, SILU, tied(), rope("half_split")),
        Fixed("attention_bias", False),
    ),
    names=(
        *FRAME,
        Row("layers.{i}.residual.attention_norm.weight", LAYER + "post_attention_layernorm.weight"),
        Row("layers.{i}.residual.ffn_norm.weight", LAYER + "post_feedforward_layernorm.weight"),
        *(*ATTENTION, *QK_NORM, *GATED_FFN),
    ),
)
