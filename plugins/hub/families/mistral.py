"""Mistral, Mixtral and MiniMax-M2."""

from dataclasses import replace
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Key, Part, Unused, refusal, show
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    FRAME,
    GATED_FFN,
    GIVEN_HEADS,
    HEADS,
    LAYER,
    MIXTURE,
    PRENORM,
    QK_NORM,
    SILU,
    SIZES,
    TABLES,
    TEMPLATE,
    TOP_K,
    WIDTH,
    WINDOW,
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.names import Row, expert_gate, expert_up, one_expert
from blockwright.plugins.hub.rope import rope

WINDOWED = (Given(("sliding_window",), none=True), WINDOW)  # 4,096 in the class

# Mistral 7B: Llama's checkpoint format, with an attention window in the first release.
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    template=TEMPLATE,
    settings=(*SIZES, *HEADS, WIDTH, EPS, SILU, tied(), rope("half_split"), *WINDOWED),
    names=(*FRAME, *PRENORM, *ATTENTION, *GATED_FFN),
    left_out=TABLES,
)


# Mixtral 8x7B: on disk each expert is w1 (gate), w3 (up), w2 (down), and the weights are always renormalised.
MOE = LAYER + "block_sparse_moe."

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    template={**MIXTURE, "gating": {"name": "softmax_topk", "renormalise": True}},
    settings=(
        *SIZES,
        *HEADS,
        EPS,
        SILU,
        tied(),
        rope("half_split", theta=1e6),
        WINDOW,
        TOP_K,
        Key("intermediate_size", "experts.d_ff", expert_width),
        Key("num_local_experts", "ffn.n_experts", n_experts),
    ),
    names=(
        *FRAME,
        *PRENORM,
        *ATTENTION,
        Row("layers.{i}.ffn.gating.weight", MOE + "gate.weight"),
        Row("layers.{i}.ffn.experts.gate_up", MOE + "experts.{e}.w1.weight", expert_gate),
        Row("layers.{i}.ffn.experts.gate_up", MOE + "experts.{e}.w3.weight", expert_up),
        Row("layers.{i}.ffn.experts.down", MOE + "experts.{e}.w2.weight", one_expert),
    ),
    left_out=TABLES,
)

# The paper's order, top-k before softmax, gives the same weights.
MIXTRAL_BY_LOGITS = replace(MIXTRAL, template={**MIXTURE, "gating": {"name": "topk_softmax"}})


# MiniMax-M2: Mixtral's files, a sigmoid gate with a bias of choice, a norm over all queries and one over all keys.


def _turned_part(config: Config) -> float:
    """The part of a head that turns: released files have it as a width."""
    width, head = config.take("rotary_dim", kind=int, default=None), config.take("head_dim", kind=int)
    return 1.0 if width is None or head == 0 else width / head


def _read_width(config: Config, model: dict[str, Any]) -> None:
    width, head = config.take("rotary_dim", kind=int, default=None), model["attention"]["head_dim"]
    turned = int(head * model["position"].get("rotary_fraction", 1.0))
    if width is not None and width != turned:
        rule = f"contradicts partial_rotary_factor, by which {turned} of a head's {head} dimensions turn"
        raise refusal("rotary_dim", width, rule, "Keep the one that the model was trained with")


def _write_width(decoder: Decoder, config: dict[str, Any]) -> None:
    config["rotary_dim"] = show(decoder, "first.attention.position.rotary_dim")  # read by vLLM


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "gqa", "qk_norm": {"name": "full"}},
        "gating": {"name": "sigmoid_bias"},
    },
    settings=(
        *(*SIZES, *GIVEN_HEADS, EPS, SILU, tied(), TOP_K),
        rope("half_split", theta=5e6, fraction=_turned_part),
        Part(_read_width, _write_width),
        Key("intermediate_size", "experts.d_ff", expert_width),
        Key("num_local_experts", "ffn.n_experts", n_experts, also=("num_experts",)),
        # Released files say what the class does without asking, and repeat keys of MiniMax-01 that nothing reads.
        Fixed("scoring_func", "sigmoid", written=False),
        Fixed("use_qk_norm", True, written=False),
        Fixed("qk_norm_type", "per_layer", written=False),
        Fixed("use_routing_bias", True, written=False),
        Fixed("shared_intermediate_size", 0, written=False),
        *(Unused(f"layernorm_{part}_beta") for part in ("full_attention", "linear_attention", "mlp")),
        *(Unused(key) for key in ("attn_type_list", "mlp_intermediate_size", "shared_moe_mode")),
        *(Unused(key) for key in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers")),
    ),
    names=(
        *MIXTRAL.names,
        *QK_NORM,
        Row("layers.{i}.ffn.gating.bias", MOE + "e_score_correction_bias"),
        Row("layers.{i}.ffn.gating.moved", ""),
    ),
    left_out=TABLES,
)
