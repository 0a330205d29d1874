"""GLM-4.5 and GLM-5, mixtures of experts."""

from __future__ import annotations

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Part, Unused, refusal, show
from blockwright.plugins.hub.deepseek_like import (
    CHOICE_BIAS,
    INDEXER,
    LAYERS,
    MLA,
    MOE,
    NAMES,
    PREDICTED,
    SELECTOR,
    SHARED,
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
    TABLES,
    tied,
)
from blockwright.plugins.hub.rope import rope

# GLM-4.5 and 4.5-Air: DeepSeek's experts and prediction heads, grouped attention with biases, half of each head turns.
#
# Multi-token prediction heads are imported only on request (``--mtp``).


def _read_qk_norm(config: Config, model: dict[str, Any]) -> None:
    if config.take("use_qk_norm", kind=bool, default=False):  # in GLM-4.5, not in Air
        model["attention"]["qk_norm"] = {"name": "per_head"}


def _write_qk_norm(decoder: Decoder, config: dict[str, Any]) -> None:
    config["use_qk_norm"] = show(decoder, "first.attention.qk_norm") is not None


GLM4_LAYERS = (*PRENORM, *ATTENTION, *QK_NORM, *GATED_FFN, *ROUTER, *CHOICE_BIAS, *EXPERTS, *SHARED)

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
    names=(*FRAME, *GLM4_LAYERS, *prediction(GLM4_LAYERS)),
    left_out=WITHOUT_PREDICTION,
)


# GLM-5 to 5.2: DeepSeek-V3.2's blocks, whose indexer turns as the attention does, and which some layers have alone.
#
# A layer without an indexer sees what the nearest layer below chose. The head of multi-token prediction, which always
# has one, is imported only on request (``--mtp``).
KINDS = {"full": "selector", "shared": "below"}  # theirs → ours, in the layout
LETTERS = {"F": "full", "S": "shared"}


def _by_rule(config: Config, depth: int) -> list[Any]:
    """The kinds of indexers where no list names them: a pattern, or one in every so many layers after an offset."""
    pattern = config.take("index_topk_pattern", default=None)
    every = config.take("index_topk_freq", kind=int, default=1)
    offset = config.take("index_skip_topk_offset", kind=int, default=2)
    if pattern is not None:
        return [LETTERS.get(letter, letter) for letter in pattern]
    return ["shared" if max(i - offset + 1, 0) % max(every, 1) else "full" for i in range(depth)]


def _read_indexers(config: Config, model: dict[str, Any]) -> None:
    model["selector"]["rope_head_dim"] = model["attention"]["qk_rope_head_dim"]
    depth, by_rule = model["n_layers"], _by_rule(config, model["n_layers"])
    kinds = config.take("indexer_types", kind=list, default=by_rule)
    if len(kinds) != depth or any(kind not in KINDS for kind in kinds) or kinds[0] != "full":
        rule = f"must name full or shared for each of the {depth} layers, and full for the first"
        raise refusal("indexer_types", kinds, rule, "Correct the list in config.json")
    if "shared" in kinds:
        below = {"name": "shared", "of": dict(model["selector"]), "every": depth}  # in every layer but the first
        model["variants"] = {**model.get("variants", {}), "selector": {"below": below}}
        model["layout"] = {**model.get("layout", {}), "selector": [KINDS[kind] for kind in kinds]}


def _write_indexers(decoder: Decoder, config: dict[str, Any]) -> None:
    show(decoder, "first.attention.selector.position")  # a model without an indexer is not of this family
    chosen: list[Any] = [layer.attention for layer in decoder.layers]
    config["indexer_types"] = ["shared" if attention.selector.reuses else "full" for attention in chosen]


GLM_MOE_DSA = Family(
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    template={**TEMPLATE, "selector": SELECTOR},
    settings=(
        Given(("first_k_dense_replace", "n_shared_experts", "q_lora_rank", "routed_scaling_factor")),
        *(*SIZES, *MLA, *MOE, EPS, SILU, tied(), rope("interleaved", sharpened=True)),
        gate(("noaux_tc",), ("noaux_tc",), renormalised=True),
        PREDICTED,
        *index_sizes("selector."),
        Part(_read_indexers, _write_indexers),
        Part(read_kinds, lambda decoder, config: None),
        *(Fixed(key, True, written=False) for key in ("rope_interleave", "indexer_rope_interleave")),
        Fixed("moe_router_dtype", "float32", written=False),
        Unused("index_share_for_mtp_iteration"),
    ),
    names=(*NAMES, *INDEXER, *prediction((*LAYERS, *INDEXER))),
    left_out=(*TABLES, *WITHOUT_PREDICTION),
)
