"""GPT-2: matrices stored (in, out); queries, keys and values fused."""

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Choice, Fixed, Key, Unused
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import n_heads
from blockwright.plugins.hub.names import TRANSPOSED, Row, third

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
