"""Qwen3-30B-A3B and its kind: routed experts in every layer."""

from blockwright.plugins.hub.config import Fixed, Key, Unused
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EXPERTS,
    FRAME,
    HEADS,
    MIXTURE,
    PRENORM,
    QK_NORM,
    RENORMALISE,
    ROUTER,
    SILU,
    SIZES,
    TOP_K,
    UNUSED_WINDOW,
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.rope import rope

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
