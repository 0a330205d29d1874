"""The language models of Qwen3.5 and 3.6: Qwen3-Next's blocks, with projections apart, dense or with routed experts.

The released files hold a vision tower too, under ``qwen3_5`` or ``qwen3_5_moe``: from those the language model is read,
and the tower is left out, as is the head of multi-token prediction. What is written is the language model, under
``qwen3_5_text`` or ``qwen3_5_moe_text``. The three rotations of a place in an image are one for text.
"""

from __future__ import annotations

from dataclasses import replace

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Fixed, Setting, Unused
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.hybrid_like import DELTA, OURS
from blockwright.plugins.hub.inner import language_of
from blockwright.plugins.hub.llama_like import EXPERTS, GATED_FFN, MIXTURE, ROUTER, WIDTH
from blockwright.plugins.hub.names import Row, beside
from blockwright.plugins.hub.qwen_like import (
    MIXERS,
    MOE,
    NAMES,
    SHARED,
    SHARED_MOE,
    TEMPLATE,
    THEIRS,
    channels,
    convolved,
    fused,
    gated_queries,
)
from blockwright.plugins.hub.rope import rope


def _fused(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of fused projections, [q|k|v]."""
    projected = beside(DELTA, fused(channels(decoder), THEIRS + "in_proj_qkv.weight"))
    return (*projected, *convolved(decoder), *gated_queries(decoder))


SETTINGS: tuple[Setting, ...] = (
    *MIXERS,
    rope("half_split", fraction=0.25, idle=("mrope_section", "mrope_interleaved")),
    Fixed("attn_output_gate", True, written=False),
    Fixed("output_gate_type", "swish", written=False),  # of the delta layers
    *(Unused(key) for key in ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")),
)
APART = tuple(
    Row(f"{OURS}{ours}.weight", f"{THEIRS}in_proj_{theirs}.weight")
    for ours, theirs in (("output_gate.project", "z"), ("strength", "b"), ("decay.project", "a"))
)

QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    template={**TEMPLATE, "ffn": {"name": "swiglu"}},
    settings=(*SETTINGS, WIDTH),
    names=(*NAMES, *beside(DELTA, APART), *GATED_FFN),
    left_out=(r"mtp\..*",),
    sized=_fused,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    template={**MIXTURE, **TEMPLATE, "ffn": SHARED_MOE, "gating": {"name": "softmax_topk", "renormalise": True}},
    settings=(
        *SETTINGS,
        *MOE,
        Fixed("norm_topk_prob", True, written=False),
        Fixed("mlp_only_layers", [], written=False),
    ),
    names=(*NAMES, *beside(DELTA, APART), *ROUTER, *EXPERTS, *SHARED),
)
WITH_VISION = tuple(
    language_of(
        family,
        model_type=family.model_type.removesuffix("_text"),
        places=("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_config"),
        left_out=(r"model\.visual\..*", r"mtp\..*"),
    )
    for family in (QWEN3_5, QWEN3_5_MOE)
)
