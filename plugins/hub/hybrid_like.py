"""Rows of settings and names that families of linear and full layers share."""

from __future__ import annotations

from typing import Any

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Key, Part, linear, refusal, show
from blockwright.plugins.hub.llama_like import FULL, read_types
from blockwright.plugins.hub.names import TAPS, Row

LINEAR = "linear_attention"
OURS = "layers.{i}.attention."
DELTA = OURS + "decay.log_rate"  # what only a layer of the delta rule has


def delta(theirs: str, norm: str, output: str) -> tuple[Row, ...]:
    """The rows of a delta rule that are alike in all families.

    Args:
        theirs: start of their names
        norm, output: their names of the norm of the outputs and of the output projection
    """
    return (
        Row(OURS + "decay.bias", theirs + "dt_bias"),
        Row(OURS + "norm.weight", f"{theirs}{norm}.weight"),
        Row(OURS + "output.weight", f"{theirs}{output}.weight"),
    )


def apart(theirs: str) -> tuple[Row, ...]:
    """Queries, keys and values with a projection and a convolution each."""
    named = (("query", "q"), ("key", "k"), ("value", "v"))
    return (
        *(Row(f"{OURS}{our}.weight", f"{theirs}{their}_proj.weight") for our, their in named),
        *(Row(f"{OURS}{our}_conv.weight", f"{theirs}{their}_conv1d.weight", form=TAPS) for our, their in named),
    )


def kda(theirs: str) -> tuple[Row, ...]:
    """The rows of a delta rule with a decay for each channel, but for the rate of each head, whose form differs."""
    return (
        *(*delta(theirs, "o_norm", "o_proj"), *apart(theirs)),
        Row(OURS + "strength.weight", theirs + "b_proj.weight"),
        *(
            Row(f"{OURS}{our}.{side}.weight", f"{theirs}{their}_{letter}_proj.weight")
            for our, their in (("decay", "f"), ("output_gate", "g"))
            for side, letter in (("down", "a"), ("up", "b"))
        ),
    )


def read_mixers(types: list[str], model: dict[str, Any]) -> None:
    """Full layers get the model's own attention, the others its variant ``linear``."""
    if FULL not in types:
        raise refusal("layer_types", types, f"must name {FULL} for some layer", "Models without are not supported")
    model["layout"] = {**model.get("layout", {}), "attention": ["attention" if t == FULL else "linear" for t in types]}


def types(decoder: Decoder) -> list[str]:
    """The kind of each layer."""
    return [LINEAR if isinstance(layer.attention, Recurrent) else FULL for layer in decoder.layers]


def _read_types(config: Config, model: dict[str, Any]) -> None:
    every = config.take("full_attention_interval", kind=int, default=4)
    if every < 1:
        raise refusal("full_attention_interval", every, "must be at least 1", "Correct the value in config.json")
    read_mixers(read_types(config, model, (FULL, LINEAR), lambda i: LINEAR if (i + 1) % every else FULL), model)


def _write_types(decoder: Decoder, config: dict[str, Any]) -> None:
    config["layer_types"] = types(decoder)


TYPES = Part(_read_types, _write_types)


def _key_heads(decoder: Decoder) -> int:
    attention: Any = linear(decoder).attention
    return attention.query.out_features // attention.head_dim


def _value_heads(decoder: Decoder) -> int:
    attention: Any = linear(decoder).attention
    return attention.value.out_features // attention.v_head_dim


def taps(decoder: Decoder) -> int:
    """Tokens that the convolutions of the first linear layer see."""
    return show(decoder, "linear.attention.query_conv.weight").shape[1]


VARIANT = "variants.attention.linear."


def _heads(config: Config) -> int:
    return config.take("num_attention_heads", kind=int)


def _key_width(config: Config) -> int:
    heads = config.take("linear_num_key_heads", kind=int, default=_heads(config))
    return int(0.75 * config.take("hidden_size", kind=int) / max(1, heads))


def _value_width(config: Config) -> int:
    return 2 * config.take("linear_key_head_dim", kind=int, default=_key_width(config))


# Defaults are OLMo-Hybrid's; Qwen3-Next has numbers of its own, and its keys must be present.
DELTA_SIZES = (
    Key("linear_num_key_heads", VARIANT + "n_key_heads", _key_heads, default=_heads),
    Key("linear_num_value_heads", VARIANT + "n_heads", _value_heads, default=_heads),
    Key("linear_key_head_dim", VARIANT + "head_dim", "linear.attention.head_dim", default=_key_width),
    Key("linear_value_head_dim", VARIANT + "v_head_dim", "linear.attention.v_head_dim", default=_value_width),
    Key("linear_conv_kernel_dim", VARIANT + "taps", taps, default=4),
)
