"""All families."""

from blockwright.plugins.hub.families.bailing_hybrid import BAILING_HYBRID
from blockwright.plugins.hub.families.deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from blockwright.plugins.hub.families.deepseek_v4 import DEEPSEEK_V4
from blockwright.plugins.hub.families.deepseek_vl_v2 import DEEPSEEK_VL_V2
from blockwright.plugins.hub.families.gemma import GEMMA2, GEMMA3
from blockwright.plugins.hub.families.gemma4 import GEMMA4
from blockwright.plugins.hub.families.glm import GLM4_MOE, GLM_MOE_DSA
from blockwright.plugins.hub.families.glm_next import GLM5_NEXT, GLM5_NEXT_WITH_VISION
from blockwright.plugins.hub.families.gpt import GPT2, GPT_OSS
from blockwright.plugins.hub.families.inkling import INKLING
from blockwright.plugins.hub.families.kimi_linear import KIMI_LINEAR
from blockwright.plugins.hub.families.llama import APERTUS, LLAMA, SMOLLM3
from blockwright.plugins.hub.families.longcat_flash import LONGCAT_FLASH
from blockwright.plugins.hub.families.mistral import MINIMAX_M2, MISTRAL, MIXTRAL, MIXTRAL_BY_LOGITS
from blockwright.plugins.hub.families.nemotron_h import NEMOTRON_H
from blockwright.plugins.hub.families.olmo import OLMO2, OLMO_HYBRID, OLMOE
from blockwright.plugins.hub.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from blockwright.plugins.hub.families.qwen_hybrid import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT, WITH_VISION
from blockwright.plugins.hub.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, OLMO2, OLMOE, GPT_OSS, GPT2, GEMMA2),
        *(SMOLLM3, GEMMA3, GEMMA4, GLM4_MOE, MINIMAX_M2, APERTUS, QWEN3_NEXT, OLMO_HYBRID, KIMI_LINEAR, NEMOTRON_H),
        *(QWEN3_5, QWEN3_5_MOE, *WITH_VISION, BAILING_HYBRID, LONGCAT_FLASH, INKLING),
        *(DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32, GLM_MOE_DSA, DEEPSEEK_V4, DEEPSEEK_VL_V2),
        *(GLM5_NEXT, GLM5_NEXT_WITH_VISION),
    )
}

# Where several describe the same decoder, export uses the first.
WRITTEN = (*FAMILIES.values(), MIXTRAL_BY_LOGITS)
