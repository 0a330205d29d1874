"""DeepSeek-V2, V2-Lite and V2.5, and the language models of VL2 small and base.

transformers never renormalises in this family, whatever ``norm_topk_prob`` is, and no released V2 sets it. A checkpoint
that sets it is read as the released code means it, and cannot be exported. A sigmoid gate (``noaux_tc``, VL2 base) is
read here but exported as deepseek_v3, whose class in transformers has it.
"""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Part
from blockwright.plugins.hub.deepseek_like import MLA, MOE, NAMES, SOFTMAX, TEMPLATE, gate
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import DIVIDED, EPS, SILU, SIZES, TABLES, tied
from blockwright.plugins.hub.rope import rope


def _refuse_renormalised(decoder: Decoder, config: dict[str, Any]) -> None:
    if config["norm_topk_prob"]:
        raise AttributeError("transformers does not renormalise expert weights in this family")


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    template=TEMPLATE,
    settings=(
        *(*SIZES, *MLA, DIVIDED, *MOE, EPS, SILU, tied(), rope("interleaved", sharpened=True)),
        gate((*SOFTMAX, "noaux_tc"), SOFTMAX, renormalised=False),
        Part(lambda config, model: None, _refuse_renormalised),
    ),
    names=NAMES,
    left_out=TABLES,
)
