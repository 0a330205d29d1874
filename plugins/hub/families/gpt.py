"""GPT-2 and gpt-oss."""

from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Choice, Fixed, Key, Unused
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
    n_heads,
    tied,
)
from blockwright.plugins.hub.names import TRANSPOSED, Form, Row, third
from blockwright.plugins.hub.rope import required, rope

# GPT-2: matrices stored (in, out); queries, keys and values fused.
BLOCK = "transformer.h.{i}."


def _ffn_width(decoder: Decoder) -> int:
    return decoder.layers[0].ffn.up.out_features  # type: ignore[union-attr, return-value]


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    template={
        "attention": {"name": "mha", "bias": True},
        "position": {"name": "learned"},
        "ffn": {"name": "gelu", "bias": True},
        "norm": {"name": "layernorm"},
        "residual": {"name": "prenorm"},
    },
    settings=(
        Key("vocab_size", "vocab_size", "embedding.num_embeddings"),
        Key("n_embd", "d_model", "embedding.embedding_dim"),
        Key("n_layer", "n_layers", lambda decoder: len(decoder.layers)),
        Key("n_head", "attention.n_heads", n_heads),
        Key("n_positions", "max_positions", lambda decoder: decoder.config["max_positions"]),
        Key("n_inner", "ffn.d_ff", _ffn_width, default=None),
        Key("layer_norm_epsilon", "norm.eps", "norm.eps", float, 1e-5),
        Key("tie_word_embeddings", "tie_embeddings", lambda decoder: decoder.head is None, bool, True),
        Choice(
            "activation_function",
            "ffn.approximate",
            "first.ffn.approximate",
            {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"},
            default="gelu_new",
        ),
        Fixed("scale_attn_weights", True),
        Fixed("scale_attn_by_inverse_layer_idx", False),
        Fixed("reorder_and_upcast_attn", False, also=(True,)),  # the same numbers in another precision
        Fixed("add_cross_attention", False),
        *(Unused(f"summary_{x}") for x in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")),
        *(Unused(x) for x in ("n_ctx", "n_special", "predict_special_tokens")),
    ),
    names=(
        Row("embedding.weight", "transformer.wte.weight"),
        Row("position.embedding.weight", "transformer.wpe.weight"),
        Row("norm.*", "transformer.ln_f.*"),
        Row("head.weight", "lm_head.weight"),
        Row("layers.{i}.residual.attention_norm.*", BLOCK + "ln_1.*"),
        Row("layers.{i}.residual.ffn_norm.*", BLOCK + "ln_2.*"),
        *(
            Row(f"layers.{{i}}.attention.{name}.*", BLOCK + "attn.c_attn.*", form=third(n))
            for n, name in enumerate(("query", "key", "value"))
        ),
        Row("layers.{i}.attention.output.*", BLOCK + "attn.c_proj.*", form=TRANSPOSED),
        Row("layers.{i}.ffn.up.*", BLOCK + "mlp.c_fc.*", form=TRANSPOSED),
        Row("layers.{i}.ffn.down.*", BLOCK + "mlp.c_proj.*", form=TRANSPOSED),
    ),
    left_out=(r".*\.attn\.(masked_)?bias",),  # causal masks
    prefix="transformer.",
)


# gpt-oss: biases everywhere, learned sinks, windows in every other layer, experts fused and transposed.
#
# The released experts are MXFP4 blocks: plugins/hub/packed.py.


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
        *(*SIZES, *HEADS, EPS, SILU, tied(), rope("half_split", theta=150_000.0), WINDOWS, TOP_K),
        required("transformers would take YaRN with a factor of 32"),
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
