"""Rows of settings and names that most families share, having started from Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Choice, Config, Fixed, Key, Part, refusal, show
from blockwright.plugins.hub.names import Row, expert_gate, expert_up, one_expert

LAYER = "model.layers.{i}."

# ---- names -----------------------------------------------------------------------------------------------------------

FRAME = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
)
PRENORM = (
    Row("layers.{i}.residual.attention_norm.weight", LAYER + "input_layernorm.weight"),
    Row("layers.{i}.residual.ffn_norm.weight", LAYER + "post_attention_layernorm.weight"),
)
ATTENTION = (
    Row("layers.{i}.attention.query.*", LAYER + "self_attn.q_proj.*"),
    Row("layers.{i}.attention.key.*", LAYER + "self_attn.k_proj.*"),
    Row("layers.{i}.attention.value.*", LAYER + "self_attn.v_proj.*"),
    Row("layers.{i}.attention.output.*", LAYER + "self_attn.o_proj.*"),
)
QK_NORM = (
    Row("layers.{i}.attention.qk_norm.q_norm.weight", LAYER + "self_attn.q_norm.weight"),
    Row("layers.{i}.attention.qk_norm.k_norm.weight", LAYER + "self_attn.k_norm.weight"),
)
GATED_FFN = tuple(Row(f"layers.{{i}}.ffn.{m}.weight", f"{LAYER}mlp.{m}_proj.weight") for m in ("gate", "up", "down"))
ROUTER = (Row("layers.{i}.ffn.gating.weight", LAYER + "mlp.gate.weight"),)
EXPERTS = (
    Row("layers.{i}.ffn.experts.gate_up", LAYER + "mlp.experts.{e}.gate_proj.weight", expert_gate),
    Row("layers.{i}.ffn.experts.gate_up", LAYER + "mlp.experts.{e}.up_proj.weight", expert_up),
    Row("layers.{i}.ffn.experts.down", LAYER + "mlp.experts.{e}.down_proj.weight", one_expert),
)
TABLES = (r".*rotary_emb\.inv_freq",)  # rotary frequencies, in old checkpoints

# ---- settings --------------------------------------------------------------------------------------------------------

TEMPLATE: dict[str, Any] = {
    "attention": {"name": "gqa"},
    "ffn": {"name": "swiglu"},
    "norm": {"name": "rmsnorm"},
    "residual": {"name": "prenorm"},
}
SIZES = (
    Key("vocab_size", "vocab_size", "embedding.num_embeddings"),
    Key("hidden_size", "d_model", "embedding.embedding_dim"),
    Key("num_hidden_layers", "n_layers", lambda decoder: len(decoder.layers)),
    Key("max_position_embeddings", "max_positions", lambda decoder: decoder.config["max_positions"]),
)
EPS = Key("rms_norm_eps", "norm.eps", "norm.eps", kind=float)
SILU = Fixed("hidden_act", "silu", also=("swish",))
WIDTH = Key("intermediate_size", "ffn.d_ff", "first.ffn.gate.out_features")


def tied(default: bool = False) -> Key:
    """Whether the head is tied to the embedding; ``default`` is the family's meaning of an absent key."""
    return Key("tie_word_embeddings", "tie_embeddings", lambda decoder: decoder.head is None, bool, default)


def n_heads(decoder: Decoder) -> int:
    """N of the first layer that is not linear."""
    attention = show(decoder, "full.attention")
    return attention.query.out_features // attention.head_dim


def _every_head(config: Config) -> int:
    return config.take("num_attention_heads", kind=int)


HEADS = (
    Key("num_attention_heads", "attention.n_heads", n_heads),
    Key("num_key_value_heads", "attention.n_kv_heads", "full.attention.n_kv_heads", default=_every_head),
    Key("head_dim", "attention.head_dim", "full.attention.head_dim", default=None),  # default: d_model / n_heads
)
# For families with defaults of their own: without these keys a model would be read as another.
GIVEN_HEADS = (
    HEADS[0],
    Key("num_key_value_heads", "attention.n_kv_heads", "full.attention.n_kv_heads"),
    Key("head_dim", "attention.head_dim", "full.attention.head_dim"),
)


def _has_bias(decoder: Decoder) -> bool:
    return show(decoder, "first.attention.query").bias is not None


BIASED = Key("attention_bias", "attention.bias", _has_bias, bool, False)


def _read_even_heads(config: Config, model: dict[str, Any]) -> None:
    model["attention"]["head_dim"] = config.take("head_dim", kind=int, default=None)


def _write_even_heads(decoder: Decoder, config: dict[str, Any]) -> None:
    width = show(decoder, "full.attention.head_dim")
    if width * config["num_attention_heads"] != config["hidden_size"]:
        config["head_dim"] = width


EVEN_HEADS = (*HEADS[:2], Part(_read_even_heads, _write_even_heads))  # for families without the key


def _refuse_uneven(decoder: Decoder, config: dict[str, Any]) -> None:
    if config["hidden_size"] % config["num_attention_heads"]:
        raise AttributeError("transformers requires a hidden_size divisible by the number of heads, despite head_dim")


DIVIDED = Part(lambda config, model: None, _refuse_uneven)  # for families whose configuration requires it

# ---- sliding windows -------------------------------------------------------------------------------------------------


def _read_window(config: Config, model: dict[str, Any]) -> None:
    window = config.take("sliding_window", kind=int, default=None)
    if window is not None:
        model["attention"] |= {"name": "sliding_window", "window": window}


def _write_window(decoder: Decoder, config: dict[str, Any]) -> None:
    config["sliding_window"] = getattr(decoder.layers[0].attention, "window", None)


WINDOW = Part(_read_window, _write_window)  # the same in every layer, or none
FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(config: Config, model: dict[str, Any], every: int = 2) -> None:
    """Full attention in some layers, windows in others; by default each ``every``-th layer is full."""
    window = config.take("sliding_window", "sliding_window_size", kind=int)
    types = read_types(config, model, (FULL, SLIDING), lambda i: SLIDING if (i + 1) % every else FULL)
    model["attention"] |= {"name": "sliding_window", "window": window}
    model["variants"] = {"attention": {"full": {"window": None}}}
    model["layout"] = {"attention": ["full" if t == FULL else "attention" for t in types]}


def read_types(
    config: Config, model: dict[str, Any], known: tuple[str, ...], default: Callable[[int], str]
) -> list[str]:
    """The kind of each layer, one of ``known``; ``default`` gives that of a layer where the key is absent."""
    types = config.take("layer_types", kind=list, default=None)
    types = [default(i) for i in range(model["n_layers"])] if types is None else types
    if len(types) != model["n_layers"] or not all(t in known for t in types):
        rule = f"must name {' or '.join(known)} for each of the {model['n_layers']} layers"
        raise refusal("layer_types", types, rule, "Correct the list in config.json")
    return types


def write_windows(decoder: Decoder, config: dict[str, Any]) -> None:
    """The window, and the kind of each layer."""
    windows = [layer.attention.window for layer in decoder.layers]  # type: ignore[union-attr]
    config["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    config["sliding_window"] = next((w for w in windows if w is not None), decoder.config["max_positions"])


WINDOWS = Part(read_windows, write_windows)  # full attention in some layers, windows in others


def _read_unused_window(config: Config, model: dict[str, Any]) -> None:
    config.taken |= {"sliding_window", "max_window_layers", "use_sliding_window"}
    if config.values.get("use_sliding_window"):
        rule = "windows in the upper layers only are not supported"
        raise refusal("use_sliding_window", True, rule, "Published checkpoints of this family leave it off")
    types = config.take("layer_types", kind=list, default=[])
    if any(t != FULL for t in types):
        raise refusal("layer_types", types, f"must name {FULL} for every layer", "Leave windows off")


def _write_unused_window(decoder: Decoder, config: dict[str, Any]) -> None:
    config |= {"use_sliding_window": False, "sliding_window": None}


UNUSED_WINDOW = Part(_read_unused_window, _write_unused_window)  # off in released checkpoints

# ---- mixtures of experts ---------------------------------------------------------------------------------------------


def n_experts(decoder: Decoder) -> int:
    """E of the first layer with routed experts."""
    return show(decoder, "sparse.ffn.gating.n_experts")


def expert_width(decoder: Decoder) -> int:
    """F of one expert."""
    return show(decoder, "sparse.ffn.experts.down").shape[2]


MIXTURE: dict[str, Any] = {
    **TEMPLATE,
    "ffn": {"name": "moe"},
    "gating": {"name": "softmax_topk"},
    "experts": {"name": "swiglu"},
}
TOP_K = Key("num_experts_per_tok", "gating.top_k", "sparse.ffn.gating.top_k", also=("experts_per_token",))
RENORMALISE = Key("norm_topk_prob", "gating.renormalise", "sparse.ffn.gating.renormalise", bool, default=False)
GELU_TANH = Choice("hidden_activation", "ffn.name", lambda decoder: "geglu", {"gelu_pytorch_tanh": "geglu"})
