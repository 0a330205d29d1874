"""DeepSeek-V3.2 and V3.2-Exp: V3 whose queries see the tokens that an indexer chooses (``selector: dsa``).

The indexer's keys have a layer norm, and its positions are those of the attention in halves. Its queries are made from
the attention's compressed ones, so these are compressed. The heads of multi-token prediction have an indexer too; they
are imported only on request (``--mtp``).
"""

from __future__ import annotations

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Part, show
from blockwright.plugins.hub.deepseek_like import (
    INDEXER,
    LAYERS,
    MLA,
    MOE,
    NAMES,
    PREDICTED,
    SELECTOR,
    TEMPLATE,
    WITHOUT_PREDICTION,
    gate,
    index_sizes,
    prediction,
    read_kinds,
)
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import EPS, SILU, SIZES, TABLES, tied
from blockwright.plugins.hub.rope import rope


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
