"""DeepSeekMoE-16B, and the language model of DeepSeek-VL2 tiny: Llama's attention, DeepSeek's experts.

transformers has no class for it; the released remote code is never run here.
"""

from blockwright.plugins.hub.config import Fixed, Unused
from blockwright.plugins.hub.deepseek_like import MOE, SHARED, gate
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EXPERTS,
    FRAME,
    GATED_FFN,
    HEADS,
    MIXTURE,
    PRENORM,
    ROUTER,
    SILU,
    SIZES,
    TABLES,
    tied,
)
from blockwright.plugins.hub.rope import rope

DEEPSEEK = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    template=MIXTURE,
    settings=(
        *(
            *SIZES,
            *HEADS,
            *MOE,
            EPS,
            SILU,
            tied(),
            rope("half_split"),
            gate(("greedy",), ("greedy",), renormalised=False),
        ),
        Fixed("attention_bias", False),
        Fixed("use_mla", False, written=False),
        *(Unused(f"{x}_head_dim") for x in ("qk_nope", "qk_rope", "v")),  # 0 or null where use_mla is false
        *(Unused(f"{x}_lora_rank") for x in ("q", "kv")),
    ),
    names=(*FRAME, *PRENORM, *ATTENTION, *GATED_FFN, *ROUTER, *EXPERTS, *SHARED),
    left_out=TABLES,
)
