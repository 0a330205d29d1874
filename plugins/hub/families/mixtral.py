"""Mixtral 8x7B: on disk each expert is w1 (gate), w3 (up), w2 (down), and the weights are always renormalised."""

from dataclasses import replace

from blockwright.plugins.hub.config import Key
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    FRAME,
    HEADS,
    LAYER,
    MIXTURE,
    PRENORM,
    SILU,
    SIZES,
    TABLES,
    TOP_K,
    WINDOW,
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.names import Row, expert_gate, expert_up, one_expert
from blockwright.plugins.hub.rope import rope

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
        rope("half_split"),
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
