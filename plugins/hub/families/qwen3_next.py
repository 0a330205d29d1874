"""Qwen3-Next: gated delta layers and gated attention, both with fused projections; routed experts beside a gated one.

In memory projections are apart, so that heads can be split over ranks. The head of multi-token prediction is left out,
as in transformers.
"""

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Fixed, Given, Unused
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.hybrid_like import DELTA
from blockwright.plugins.hub.llama_like import EXPERTS, MIXTURE, RENORMALISE, ROUTER
from blockwright.plugins.hub.names import Row, beside
from blockwright.plugins.hub.places import show
from blockwright.plugins.hub.qwen_like import (
    MIXERS,
    MOE,
    NAMES,
    SHARED,
    SHARED_MOE,
    TEMPLATE,
    THEIRS,
    convolved,
    fused,
    gated_queries,
)
from blockwright.plugins.hub.rope import rope


def _fused(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of fused projections, [q|k|v|z] and [β|decay] of each key head."""
    mixer = show(decoder, "linear.attention")
    K, V = mixer.head_dim, mixer.v_head_dim
    groups, values = mixer.query.out_features // K, mixer.shared_by * V
    widths = {"query": K, "key": K, "value": values, "output_gate.project": values}
    scalars = dict.fromkeys(("strength", "decay.project"), mixer.shared_by)
    return (
        *beside(DELTA, fused(widths, THEIRS + "in_proj_qkvz.weight", groups=groups)),
        *beside(DELTA, fused(scalars, THEIRS + "in_proj_ba.weight", groups=groups)),
        *convolved(decoder),
        *gated_queries(decoder),
    )


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    template={**MIXTURE, **TEMPLATE, "ffn": SHARED_MOE},
    settings=(
        Given(("norm_topk_prob",)),
        *(*MIXERS, rope("half_split", fraction=0.25), *MOE, RENORMALISE),
        Fixed("decoder_sparse_step", 1),
        Fixed("mlp_only_layers", []),
        Fixed("use_sliding_window", False, written=False),
        Unused("intermediate_size"),
    ),
    names=(*NAMES, *ROUTER, *EXPERTS, *SHARED),
    left_out=(r"mtp\..*",),
    sized=_fused,
)
