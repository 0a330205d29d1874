"""Qwen2, Qwen3 and its mixture of experts."""

from blockwright.plugins.hub.config import Fixed, Key, Unused
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EVEN_HEADS,
    EXPERTS,
    FRAME,
    GATED_FFN,
    HEADS,
    MIXTURE,
    PRENORM,
    QK_NORM,
    RENORMALISE,
    ROUTER,
    SILU,
    SIZES,
    TEMPLATE,
    TOP_K,
    UNUSED_WINDOW,
    WIDTH,
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.rope import rope

# Qwen2 and 2.5: Llama with biases on queries, keys and values, and none on the output.
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


# Qwen3, dense: a norm on each head of queries and keys, and no biases.
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


# Qwen3-30B-A3B and its kind: routed experts in every layer.
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    template={**MIXTURE, "attention": {"name": "gqa", "qk_norm": {"name": "per_head"}}},
    settings=(
        *(*SIZES, *HEADS, EPS, SILU, tied(), rope("half_split"), UNUSED_WINDOW, TOP_K, RENORMALISE),
        Key("moe_intermediate_size", "experts.d_ff", expert_width),
        Key("num_experts", "ffn.n_experts", n_experts, also=("num_local_experts",)),
        Fixed("attention_bias", False),
        Fixed("decoder_sparse_step", 1),
        Fixed("mlp_only_layers", []),
        Unused("intermediate_size"),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *QK_NORM, *ROUTER, *EXPERTS),
)
