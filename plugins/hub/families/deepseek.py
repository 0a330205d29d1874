"""DeepSeek's language models but V4: MoE-16B, V2, V3 and V3.2."""

from __future__ import annotations

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Part, Unused, show
from blockwright.plugins.hub.deepseek_like import (
    INDEXER,
    LAYERS,
    MLA,
    MOE,
    NAMES,
    PREDICTED,
    PREDICTION,
    SELECTOR,
    SHARED,
    SOFTMAX,
    TEMPLATE,
    WITHOUT_PREDICTION,
    gate,
    index_sizes,
    prediction,
    read_kinds,
)
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    DIVIDED,
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

# DeepSeekMoE-16B, and the language model of DeepSeek-VL2 tiny: Llama's attention, DeepSeek's experts.
#
# transformers has no class for it; the released remote code is never run here.
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


# DeepSeek-V2, V2-Lite and V2.5, and the language models of VL2 small and base.
#
# transformers never renormalises in this family, whatever ``norm_topk_prob`` is, and no released V2 sets it. A
# checkpoint that sets it is read as the released code means it, and cannot be exported. A sigmoid gate (``noaux_tc``,
# VL2 base) is read here but exported as deepseek_v3, whose class in transformers has it.


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


# DeepSeek-V3: the bias of expert selection is a tensor, and multi-token prediction heads follow the layers.
#
# The heads are imported only on request (``--mtp``).
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    template=TEMPLATE,
    settings=(
        *(*SIZES, *MLA, *MOE, EPS, SILU, tied(), rope("interleaved", sharpened=True)),
        Given(("routed_scaling_factor",)),  # 2.5 in the class
        gate(("noaux_tc",), ("noaux_tc",), renormalised=True),
        PREDICTED,
        Fixed("rope_interleave", True),
    ),
    names=(*NAMES, *PREDICTION),
    left_out=(*TABLES, *WITHOUT_PREDICTION),
)


# DeepSeek-V3.2 and V3.2-Exp: V3 whose queries see the tokens that an indexer chooses (``selector: dsa``).
#
# The indexer's keys have a layer norm, and its positions are those of the attention in halves. Its queries are made
# from the attention's compressed ones, so these are compressed. The heads of multi-token prediction have an indexer
# too; they are imported only on request (``--mtp``).


def _read_positions(config: Config, model: dict[str, Any]) -> None:
    """The indexer rotates as many dimensions as the attention, at the same frequencies, in halves."""
    selector = model["attention"]["selector"]
    selector["position"] = {**model["position"], "pairing": "half_split"}
    selector["rope_head_dim"] = model["attention"]["qk_rope_head_dim"]


def _write_nothing(decoder: Decoder, config: dict[str, Any]) -> None:
    show(decoder, "first.attention.selector.position")  # a model without an indexer is not of this family


DEEPSEEK_V32 = Family(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    template={**TEMPLATE, "attention": {**TEMPLATE["attention"], "selector": SELECTOR}},
    settings=(
        *(*SIZES, *MLA, *MOE, EPS, SILU, tied(), rope("interleaved", sharpened=True)),
        Given(("routed_scaling_factor",)),  # 2.5 in the class
        gate(("noaux_tc",), ("noaux_tc",), renormalised=True),
        PREDICTED,
        *index_sizes("attention.selector."),
        Part(_read_positions, _write_nothing),
        Part(read_kinds, _write_nothing),
        Fixed("rope_interleave", True, written=False),
    ),
    names=(*NAMES, *INDEXER, *prediction((*LAYERS, *INDEXER))),
    left_out=(*TABLES, *WITHOUT_PREDICTION),
)
