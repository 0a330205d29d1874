"""GLM-4.5 and 4.5-Air: DeepSeek's experts and prediction heads, grouped attention with biases, half of each head turns.

Multi-token prediction heads are imported only on request (``--mtp``).
"""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Given, Part
from blockwright.plugins.hub.deepseek_like import (
    CHOICE_BIAS,
    MOE,
    PREDICTED,
    SHARED,
    WITHOUT_PREDICTION,
    gate,
    prediction,
)
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    BIASED,
    EPS,
    EXPERTS,
    FRAME,
    GATED_FFN,
    GIVEN_HEADS,
    MIXTURE,
    PRENORM,
    QK_NORM,
    ROUTER,
    SILU,
    SIZES,
    tied,
)
from blockwright.plugins.hub.places import show
from blockwright.plugins.hub.rope import rope


def _read_qk_norm(config: Config, model: dict[str, Any]) -> None:
    if config.take("use_qk_norm", kind=bool, default=False):  # in GLM-4.5, not in Air
        model["attention"]["qk_norm"] = {"name": "per_head"}


def _write_qk_norm(decoder: Decoder, config: dict[str, Any]) -> None:
    config["use_qk_norm"] = show(decoder, "first.attention.qk_norm") is not None


LAYERS = (*PRENORM, *ATTENTION, *QK_NORM, *GATED_FFN, *ROUTER, *CHOICE_BIAS, *EXPERTS, *SHARED)

GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    template={**MIXTURE, "attention": {"name": "gqa", "output_bias": False}},
    settings=(
        Given(("first_k_dense_replace", "n_shared_experts")),
        *(*SIZES, *GIVEN_HEADS, *MOE, BIASED, EPS, SILU, tied(), rope("half_split", fraction=0.5)),
        gate(("noaux_tc",), ("noaux_tc",), renormalised=True),
        Part(_read_qk_norm, _write_qk_norm),
        PREDICTED,
    ),
    names=(*FRAME, *LAYERS, *prediction(LAYERS)),
    left_out=WITHOUT_PREDICTION,
)
