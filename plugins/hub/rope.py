"""Rotary positions: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``, ↔ our position node.

Weights stay as stored. Which dimensions form a pair is a parameter of our block (``pairing``), so nothing is permuted
and a round trip is bit-exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from blockwright import registry
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Part, number, refusal
from blockwright.registry import Node

# their rope_type → our block, and their key → our parameter
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("rope", {}),
    "proportional": ("rope_fastest", {}),
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
ORIGINAL = "original_max_position_embeddings"
SHARPENED = {"mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}  # DeepSeek's rule only
PLAIN = {"mscale": 1.0, "mscale_all_dim": 0.0}  # YaRN elsewhere: amplitude only
STRETCH = ("factor", "low_freq_factor", "high_freq_factor")  # without which transformers reads no such positions


@dataclass(frozen=True)
class Habits:
    """What a family means by the keys of rotary positions.

    Args:
        pairing: which dimensions of the stored projections form a pair
        sharpened: whether YaRN follows DeepSeek's softmax rule (mscale, mscale_all_dim)
        theta: the meaning of an absent rope_theta
        fraction: the meaning of an absent partial_rotary_factor, or a function of the Config that returns it; None for
            families that rotate whole heads only
        idle: keys of it that change nothing
    """

    pairing: Literal["half_split", "interleaved"]
    sharpened: bool = False
    theta: float = 10000.0
    fraction: float | Callable[[Config], float] | None = None
    idle: tuple[str, ...] = ()


def rope(
    pairing: Literal["half_split", "interleaved"],
    sharpened: bool = False,
    theta: float = 10000.0,
    fraction: float | Callable[[Config], float] | None = None,
    idle: tuple[str, ...] = (),
) -> Part:
    """The settings of rotary positions; arguments as in ``Habits``."""
    habits = Habits(pairing, sharpened, theta, fraction, idle)

    def read(config: Config, model: dict[str, Any]) -> None:
        model["position"] = read_rope(config, habits)

    def write(decoder: Decoder, config: dict[str, Any]) -> None:
        config["rope_parameters"] = parameters(decoder.config["position"], habits)
        scaling = {k: v for k, v in config["rope_parameters"].items() if k != "rope_theta"}
        fraction = scaling.pop("partial_rotary_factor", None)
        config |= {} if fraction is None else {"partial_rotary_factor": fraction}
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # read by transformers before 5
        config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling

    return Part(read, write)


def required(otherwise: str) -> Part:
    """Refuse a config.json without positions, of a family whose class has others than plain ones."""

    def read(config: Config, model: dict[str, Any]) -> None:
        if not (config.values.get("rope_parameters") or config.values.get("rope_scaling")):
            raise refusal("rope_parameters", None, f"is required: {otherwise}", "Write what the model was trained with")

    return Part(read, lambda decoder, config: None)


def read_rope(config: Config, habits: Habits) -> dict[str, Any]:
    """The position node that a config.json describes.

    Raises:
        ConfigError: a key is wrong, contradicts another, or has a value that is not supported
    """
    where = "rope_parameters" if config.values.get("rope_parameters") else "rope_scaling"
    theta = config.take("rope_theta", kind=float, default=habits.theta)
    absent = habits.fraction(config) if callable(habits.fraction) else habits.fraction
    whole = 1.0 if absent is None else absent
    fraction = whole if "partial_rotary_factor" in habits.idle else config.take("partial_rotary_factor", default=whole)
    scaling = config.take("rope_scaling", kind=dict, default={})
    parameters = config.take("rope_parameters", kind=dict, default={})
    given = {k: v for k, v in {**scaling, **parameters}.items() if v is not None and k not in habits.idle}
    for key in scaling.keys() & parameters.keys():
        if scaling[key] != parameters[key]:
            rule = f"contradicts rope_parameters.{key} = {parameters[key]}"
            raise refusal(f"rope_scaling.{key}", scaling[key], rule, "Keep the one that the model was trained with")
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise refusal(f"{where}.rope_type", kind, "is not supported", f"Known: {', '.join(KINDS)}")
    name, keys = KINDS[kind]
    keys = {**keys, **SHARPENED} if kind == "yarn" and habits.sharpened else keys
    theta, fraction = given.pop("rope_theta", theta), given.pop("partial_rotary_factor", fraction)
    node = {"name": name, "theta": number(f"{where}.rope_theta", theta)}
    if fraction != 1.0 or kind == "proportional":  # whose block turns a quarter by default
        node["rotary_fraction"] = _fraction(f"{where}.partial_rotary_factor", fraction, kind, habits)
    if ORIGINAL in keys and ORIGINAL not in given:
        given[ORIGINAL] = config.take("max_position_embeddings", kind=int)
    for key in STRETCH:
        if key in keys and key not in given:
            rule = f"is required by rotary positions of type {kind!r}"
            raise refusal(f"{where}.{key}", None, rule, "Use the config.json that the model was trained with")
    for key, value in given.items():
        if key not in keys:
            rule = f"rotary positions of type {kind!r} do not use it"
            raise refusal(f"{where}.{key}", value, rule, f"Known: {', '.join(keys) or 'rope_theta'}")
        ours = keys[key]
        node[ours] = value if ours in ("truncate", "original_positions") else number(f"{where}.{key}", value)
    node["pairing"] = habits.pairing
    return node if kind != "yarn" else {**(_temperature(given) if habits.sharpened else PLAIN), **node}


def _fraction(key: str, value: Any, kind: str, habits: Habits) -> float:
    """The part of a head that is rotated, where that is not all of it."""
    if habits.fraction is None or kind == "yarn":
        rule = "must be 1: " + ("yarn" if habits.fraction is not None else "this family") + " rotates whole heads"
        raise refusal(key, value, rule, "Other values are not supported")
    if not 0 < number(key, value) <= 1:
        raise refusal(key, value, "must lie in (0, 1]", "Correct the value in config.json")
    return float(value)


def _temperature(given: dict[str, Any]) -> dict[str, float]:
    """DeepSeek's meaning of absent keys: m = 1, softmax unchanged."""
    return {"mscale": given.get("mscale", 1.0), "mscale_all_dim": given.get("mscale_all_dim", 0.0)}


def parameters(position: Any, habits: Habits) -> dict[str, Any]:
    """The rope_parameters of a position node.

    Raises:
        AttributeError: no config.json can describe it
    """
    entry, node = registry.resolve("position", Node(position, "model.position"))
    for kind, (name, keys) in KINDS.items():
        if name == entry.name:
            keys = {**keys, **SHARPENED} if kind == "yarn" and habits.sharpened else keys
            for key, value in PLAIN.items() if kind == "yarn" and not habits.sharpened else ():
                if node[key] != value:
                    raise AttributeError(f"model.position.{key} is {node[key]:g}, and {value:g} in this family")
            theirs = {their: node[our] for their, our in keys.items()}
            turned = {} if habits.fraction is None else {"partial_rotary_factor": node.get("rotary_fraction", 1.0)}
            return {"rope_type": kind, "rope_theta": node["theta"], **turned, **theirs}
    raise AttributeError(f"position {entry.name}")
