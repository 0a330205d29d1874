"""gpt-oss: biases everywhere, learned sinks, windows in every other layer, experts fused and transposed.

The released experts are MXFP4 blocks: plugins/hub/packed.py.
"""

from torch import Tensor

from blockwright.plugins.hub.config import Fixed, Key, Unused
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
    TOP_K,
    WINDOWS,
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.names import TRANSPOSED, Form, Row
from blockwright.plugins.hub.rope import rope

MLP, EXPERTS = "layers.{i}.ffn.", LAYER + "mlp.experts."


def halves(ours: Tensor, expert: int) -> Tensor:
    """[E,2F,…] → [E,2,F,…]: gate rows, then up rows."""
    return ours.unflatten(1, (2, -1))


# Theirs interleave gate and up outputs of one projection: [E,D,2F] for the matrix, [E,2F] for the bias.
IN_TURNS = Form(lambda theirs: theirs.unflatten(-1, (-1, 2)).permute(0, 3, 2, 1), lambda s: (s[0], s[3], 2 * s[2]))
BIAS_IN_TURNS = Form(lambda theirs: theirs.unflatten(-1, (-1, 2)).mT, lambda s: (s[0], 2 * s[2]))

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "sliding_window", "bias": True, "scores": {"name": "sinks"}},
        "gating": {"name": "topk_softmax", "bias": True},
        "experts": {"name": "clamped_swiglu"},
    },
    settings=(
        *(*SIZES, *HEADS, EPS, SILU, tied(), rope("half_split"), WINDOWS, TOP_K),
        Key("intermediate_size", "experts.d_ff", expert_width),
        Key("num_local_experts", "ffn.n_experts", n_experts, also=("num_experts",)),
        Key("swiglu_limit", "experts.limit", "sparse.ffn.experts.limit", float, 7.0),
        Key("swiglu_alpha", "experts.alpha", "sparse.ffn.experts.alpha", float, 1.702),
        Fixed("attention_bias", True),
        Unused("initial_context_length"),  # repeated in YaRN's original_max_position_embeddings
    ),
    names=(
        *(*FRAME, *PRENORM, *ATTENTION),
        Row("layers.{i}.attention.scores.sinks", LAYER + "self_attn.sinks"),
        Row(MLP + "gating.weight", LAYER + "mlp.router.weight"),
        Row(MLP + "gating.logit_bias", LAYER + "mlp.router.bias"),
        Row(MLP + "experts.gate_up", EXPERTS + "gate_up_proj", halves, IN_TURNS),
        Row(MLP + "experts.gate_up_bias", EXPERTS + "gate_up_proj_bias", halves, BIAS_IN_TURNS),
        Row(MLP + "experts.down", EXPERTS + "down_proj", form=TRANSPOSED),
        Row(MLP + "experts.down_bias", EXPERTS + "down_proj_bias"),
    ),
)
