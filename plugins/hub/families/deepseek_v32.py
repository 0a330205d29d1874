"""DeepSeek-V3.2 and V3.2-Exp: V3 whose queries see the tokens that an indexer chooses (``selector: dsa``).

The indexer's keys have a layer norm, and its positions are those of the attention in halves. Its queries are made from
the attention's compressed ones, so these are compressed. The heads of multi-token prediction have an indexer too; they
are imported only on request (``--mtp``).
"""

from __future__ import annotations

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, refusal, show
from blockwright.plugins.hub.deepseek_like import (
    LATENT_NORM,
    LAYERS,
    MLA,
    MOE,
    NAMES,
    PREDICTED,
    TEMPLATE,
    WITHOUT_PREDICTION,
    gate,
    prediction,
)
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import EPS, LAYER, SILU, SIZES, TABLES, tied
from blockwright.plugins.hub.names import Row
from blockwright.plugins.hub.rope import rope

OURS, THEIRS = "layers.{i}.attention.selector.", LAYER + "self_attn.indexer."
INDEXER = (
    Row(OURS + "query.weight", THEIRS + "wq_b.weight"),
    Row(OURS + "key.weight", THEIRS + "wk.weight"),
    Row(OURS + "k_norm.*", THEIRS + "k_norm.*"),
    Row(OURS + "weights.weight", THEIRS + "weights_proj.weight"),
)
SELECTOR = {"name": "dsa", "k_norm": {"name": "layernorm", "eps": LATENT_NORM["eps"]}}


def _read_positions(config: Config, model: dict[str, Any]) -> None:
    """The indexer rotates as many dimensions as the attention, at the same frequencies, in halves."""
    selector = model["attention"]["selector"]
    selector["position"] = {**model["position"], "pairing": "half_split"}
    selector["rope_head_dim"] = model["attention"]["qk_rope_head_dim"]


def _read_kinds(config: Config, model: dict[str, Any]) -> None:
    """Lists of each layer's kind, which transformers writes beside the numbers that they follow from."""
    n, leading = model["n_layers"], config.take("first_k_dense_replace", default=0)
    for key, right in (
        ("mlp_layer_types", ["dense"] * leading + ["sparse"] * (n - leading)),
        ("layer_types", ["indexed_attention"] * n),
    ):
        given = config.take(key, default=None)
        if given is not None and given != right:
            raise refusal(key, given, f"must be {right}", "Layers of other kinds are not supported")


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
        Key("index_n_heads", "attention.selector.n_heads", "first.attention.selector.n_heads"),
        Key("index_head_dim", "attention.selector.head_dim", "first.attention.selector.head_dim"),
        Key("index_topk", "attention.selector.top_k", "first.attention.selector.top_k"),
        Part(_read_positions, _write_nothing),
        Part(_read_kinds, _write_nothing),
        Fixed("rope_interleave", True, written=False),
    ),
    names=(*NAMES, *INDEXER, *prediction((*LAYERS, *INDEXER))),
    left_out=(*TABLES, *WITHOUT_PREDICTION),
)
