"""OLMoE: routed experts in every layer; one norm over all queries, one over all keys."""

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
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.rope import rope

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    template={**MIXTURE, "attention": {"name": "gqa", "qk_norm": {"name": "full"}}},
    settings=(
        *(*SIZES, *HEADS[:2], Unused("head_dim"), EPS, SILU, tied(), rope("half_split"), TOP_K, RENORMALISE),
        Key("intermediate_size", "experts.d_ff", expert_width),
        Key("num_experts", "ffn.n_experts", n_experts),
        Fixed("attention_bias", False),
        Fixed("clip_qkv", None),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *QK_NORM, *ROUTER, *EXPERTS),
)
