"""DeepSeek-V3: the bias of expert selection is a tensor, and multi-token prediction heads follow the layers.

The heads are imported only on request (``--mtp``).
"""

from blockwright.plugins.hub.config import Fixed
from blockwright.plugins.hub.deepseek_like import (
    MLA,
    MOE,
    NAMES,
    PREDICTED,
    PREDICTION,
    TEMPLATE,
    WITHOUT_PREDICTION,
    gate,
)
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import EPS, SILU, SIZES, TABLES, tied
from blockwright.plugins.hub.rope import rope

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    template=TEMPLATE,
    settings=(
        *(*SIZES, *MLA, *MOE, EPS, SILU, tied(), rope("interleaved", sharpened=True)),
        gate(("noaux_tc",), ("noaux_tc",), renormalised=True),
        PREDICTED,
        Fixed("rope_interleave", True),
    ),
    names=(*NAMES, *PREDICTION),
    left_out=(*TABLES, *WITHOUT_PREDICTION),
)
