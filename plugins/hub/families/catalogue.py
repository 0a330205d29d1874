"""All families."""

from blockwright.plugins.hub.families.apertus import APERTUS
from blockwright.plugins.hub.families.bailing_hybrid import BAILING_HYBRID
from blockwright.plugins.hub.families.deepseek import DEEPSEEK
from blockwright.plugins.hub.families.deepseek_v2 import DEEPSEEK_V2
from blockwright.plugins.hub.families.deepseek_v3 import DEEPSEEK_V3
from blockwright.plugins.hub.families.deepseek_v4 import DEEPSEEK_V4
from blockwright.plugins.hub.families.deepseek_v32 import DEEPSEEK_V32
from blockwright.plugins.hub.families.deepseek_vl_v2 import DEEPSEEK_VL_V2
from blockwright.plugins.hub.families.gemma2 import GEMMA2
from blockwright.plugins.hub.families.gemma3 import GEMMA3
from blockwright.plugins.hub.families.gemma4 import GEMMA4
from blockwright.plugins.hub.families.glm4_moe import GLM4_MOE
from blockwright.plugins.hub.families.glm_moe_dsa import GLM_MOE_DSA
from blockwright.plugins.hub.families.gpt2 import GPT2
from blockwright.plugins.hub.families.gpt_oss import GPT_OSS
from blockwright.plugins.hub.families.inkling import INKLING
from blockwright.plugins.hub.families.kimi_linear import KIMI_LINEAR
from blockwright.plugins.hub.families.llama import LLAMA
from blockwright.plugins.hub.families.longcat_flash import LONGCAT_FLASH
from blockwright.plugins.hub.families.minimax_m2 import MINIMAX_M2
from blockwright.plugins.hub.families.mistral import MISTRAL
from blockwright.plugins.hub.families.mixtral import MIXTRAL, MIXTRAL_BY_LOGITS
from blockwright.plugins.hub.families.nemotron_h import NEMOTRON_H
from blockwright.plugins.hub.families.olmo2 import OLMO2
from blockwright.plugins.hub.families.olmo_hybrid import OLMO_HYBRID
from blockwright.plugins.hub.families.olmoe import OLMOE
from blockwright.plugins.hub.families.qwen2 import QWEN2
from blockwright.plugins.hub.families.qwen3 import QWEN3
from blockwright.plugins.hub.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, WITH_VISION
from blockwright.plugins.hub.families.qwen3_moe import QWEN3_MOE
from blockwright.plugins.hub.families.qwen3_next import QWEN3_NEXT
from blockwright.plugins.hub.families.smollm3 import SMOLLM3
from blockwright.plugins.hub.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, OLMO2, OLMOE, GPT_OSS, GPT2, GEMMA2),
        *(SMOLLM3, GEMMA3, GEMMA4, GLM4_MOE, MINIMAX_M2, APERTUS, QWEN3_NEXT, OLMO_HYBRID, KIMI_LINEAR, NEMOTRON_H),
        *(QWEN3_5, QWEN3_5_MOE, *WITH_VISION, BAILING_HYBRID, LONGCAT_FLASH, INKLING),
        *(DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32, GLM_MOE_DSA, DEEPSEEK_V4, DEEPSEEK_VL_V2),
    )
}

# Where several describe the same decoder, export uses the first.
WRITTEN = (*FAMILIES.values(), MIXTRAL_BY_LOGITS)
