"""Rotary positions: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``, ↔ our position node.

Weights stay as stored. Which dimensions form a pair is a parameter of our block (``pairing``), so nothing is permuted
and a round trip is bit-exact.
"""

from __future__ import annotations

from typing import Any, Literal

import registry
from blocks.decoder import Decoder
from interop.config import Config, Part, number, refusal
from registry import Node

# their rope_type → our block, and their key → our parameter
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("rope", {}),
    "linear": ("rope_linear", {"factor": "factor"}),
    "llama3": (
        "rope_llama3",
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_positions",
        },
    ),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_positions",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "truncate",
        },
    ),
}
SHARPENED = {"mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}  # DeepSeek's rule only
PLAIN = {"mscale": 1.0, "mscale_all_dim": 0.0}  # YaRN elsewhere: amplitude only


def rope(pairing: Literal["half_split", "interleaved"], sharpened: bool = False) -> Part:
    """The settings of rotary positions.

    Args:
        pairing: which dimensions of the stored projections form a pair
        sharpened: whether YaRN follows DeepSeek's softmax rule (mscale, mscale_all_dim)
    """

    def read(config: Config, model: dict[str, Any]) -> None:
        model["position"] = {**_node(config, sharpened), "pairing": pairing}

    def write(decoder: Decoder, config: dict[str, Any]) -> None:
        config["rope_parameters"] = _parameters(decoder, sharpened)
        scaling = {k: v for k, v in config["rope_parameters"].items() if k != "rope_theta"}
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # read by transformers before 5
        config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling

    return Part(read, write)


def _node(config: Config, sharpened: bool) -> dict[str, Any]:
    where = "rope_parameters" if config.values.get("rope_parameters") else "rope_scaling"
    theta = config.take("rope_theta", kind=float, default=10000.0)
    fraction = config.take("partial_rotary_factor", default=1.0)
    scaling = config.take("rope_scaling", kind=dict, default={})
    parameters = config.take("rope_parameters", kind=dict, default={})
    given = {k: v for k, v in {**scaling, **parameters}.items() if v is not None}
    for key in scaling.keys() & parameters.keys():
        if scaling[key] != parameters[key]:
            rule = f"contradicts rope_parameters.{key} = {parameters[key]}"
            raise refusal(f"rope_scaling.{key}", scaling[key], rule, "Keep the one that the model was trained with")
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise refusal(f"{where}.rope_type", kind, "is not supported", f"Known: {', '.join(KINDS)}")
    name, keys = KINDS[kind]
    keys = {**keys, **SHARPENED} if kind == "yarn" and sharpened else keys
    theta, fraction = given.pop("rope_theta", theta), given.pop("partial_rotary_factor", fraction)
    node = {"name": name, "theta": number(f"{where}.rope_theta", theta)}
    if fraction != 1.0:
        rule = "must be 1: no known family rotates only a part of a head"
        raise refusal(f"{where}.partial_rotary_factor", fraction, rule, "Other values are not supported")
    if "original_max_position_embeddings" in keys:
        given.setdefault("original_max_position_embeddings", config.take("max_position_embeddings", kind=int))
    for key, value in given.items():
        if key not in keys:
            rule = f"rotary positions of type {kind!r} do not use it"
            raise refusal(f"{where}.{key}", value, rule, f"Known: {', '.join(keys) or 'rope_theta'}")
        ours = keys[key]
        node[ours] = value if ours in ("truncate", "original_positions") else number(f"{where}.{key}", value)
    return node if kind != "yarn" else {**(_temperature(given) if sharpened else PLAIN), **node}


def _temperature(given: dict[str, Any]) -> dict[str, float]:
    """DeepSeek's meaning of absent keys: m = 1, softmax unchanged."""
    return {"mscale": given.get("mscale", 1.0), "mscale_all_dim": given.get("mscale_all_dim", 0.0)}


def _parameters(decoder: Decoder, sharpened: bool) -> dict[str, Any]:
    entry, node = registry.resolve("position", Node(decoder.config["position"], "model.position"))
    for kind, (name, keys) in KINDS.items():
        if name == entry.name:
            keys = {**keys, **SHARPENED} if kind == "yarn" and sharpened else keys
            theirs = {their: node[our] for their, our in keys.items()}
            return {"rope_type": kind, "rope_theta": node["theta"], **theirs}
    raise AttributeError(f"position {entry.name}")
