"""What ``blockwright plan`` is asked: its command line, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from blockwright.lab.match.request import number, whole
from blockwright.plugins.planner.hardware import Hardware, hardware
from blockwright.plugins.planner.layout import Precision
from blockwright.plugins.planner.search import CHOICES
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.arguments import read_arguments
from blockwright.training.parallel.recompute import Recompute

BATCH = 8  # sequences a GPU, unless said otherwise
SWITCH = {"true": True, "false": False}


@dataclass(frozen=True)
class Prices:
    """What is paid for.

    Args:
        gpu_hour, kwh: in any currency; None: not given
        overhead: watts drawn in all for each of the GPUs' own: hosts, network, cooling
    """

    gpu_hour: float | None = None
    kwh: float | None = None
    overhead: float = 1.3


@dataclass(frozen=True)
class Request:
    """A command line, read and checked; ``None`` leaves the model to decide."""

    model: str
    overrides: list[str]
    device: Hardware
    gpus: int
    tokens: float | None
    batch: int
    length: int | None
    precision: Precision
    prices: Prices
    chosen: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    show: Literal["layouts", "generation"] = "layouts"
    weight_bits: float = 16.0
    cache_bits: float = 16.0
    explain: bool = False
    as_json: bool = False


EXAMPLES = {"model": "deepseek_v2", "gpus": "1024", "gpu": "h800"}  # of what every plan needs
KEYS = (
    *("model", "gpus", "gpu", "tokens", "batch", "length", "precision", "price.gpu_hour", "price.kwh"),
    *("power.overhead", "weights.bits", "cache.bits"),
)
OF_TOKENS = ("price.gpu_hour", "price.kwh", "power.overhead")  # what they are multiplied by
OF_LAYOUTS = ("tokens", "batch", "precision", *OF_TOKENS, *CHOICES, "--explain")
OF_GENERATION = ("weights.bits", "cache.bits")
FLAGS = ("--explain", "--generation", "--published", "--json")
READ: Mapping[str, Callable[[str, str], Any]] = {
    **dict.fromkeys(
        ("tensor", "pipeline", "context", "expert", "interleave", "micro_batch"),
        lambda key, text: whole(key, text, 1, "is a whole number"),
    ),
    "shard": lambda key, text: _one_of(key, text, SWITCH),
    "recompute": lambda key, text: _one_of(key, text, {name: name for name in get_args(Recompute)}),
}


def read(arguments: Sequence[str]) -> Request:
    """A command line → what is asked.

    Raises:
        ConfigError: no model or GPUs, an unknown option, a value that cannot be
    """
    given = read_arguments(arguments, options=(*KEYS, *CHOICES), flags=FLAGS)
    own = given.options
    require(own, *EXAMPLES)
    for word in given.overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if not key.startswith("model"):
            raise ConfigError(key, value, "there is no such option", did_you_mean(key, [*KEYS, *CHOICES]))
    gpus = whole("gpus", own["gpus"], 1, "is a number of GPUs")
    asked = Request(
        model=own["model"],
        overrides=given.overrides,
        device=hardware(own["gpu"]),
        gpus=gpus,
        tokens=_positive(own, "tokens"),
        batch=whole("batch", own.get("batch", BATCH * gpus), 1, "is a number of sequences"),
        length=whole("length", own["length"], 2, "is a number of tokens") if "length" in own else None,
        precision=_one_of("precision", own.get("precision", "bf16"), {name: name for name in get_args(Precision)}),
        prices=Prices(
            _positive(own, "price.gpu_hour"), _positive(own, "price.kwh"), _positive(own, "power.overhead") or 1.3
        ),
        chosen=chosen_sizes(own),
        show="generation" if "--generation" in given.flags else "layouts",
        weight_bits=_positive(own, "weights.bits") or 16.0,
        cache_bits=_positive(own, "cache.bits") or 16.0,
        explain="--explain" in given.flags,
        as_json="--json" in given.flags,
    )
    _refuse_without_effect({**own, **dict.fromkeys(given.flags, "")}, asked.show)
    return asked


def _refuse_without_effect(given: Mapping[str, str], show: Literal["layouts", "generation"]) -> None:
    other, rule, remedy = {
        "generation": (OF_LAYOUTS, "is of the training, and --generation asks for none", "Leave one of them out"),
        "layouts": (
            OF_GENERATION,
            "is of generation, and a training is asked for",
            "Leave it out, or add --generation",
        ),
    }[show]
    for key in given:
        if key in other:
            raise ConfigError(key, given[key], rule, remedy)
        if key in OF_TOKENS and "tokens" not in given:
            raise ConfigError(
                key, given[key], "adds up over a training, whose length is not given", "Add e.g. tokens=1e12"
            )


def require(own: Mapping[str, str], *keys: str) -> None:
    """Refuse a command line without one of these of ``EXAMPLES``.

    Raises:
        ConfigError
    """
    for key in keys:
        if not own.get(key):
            raise ConfigError(key, own.get(key), "every plan needs it", f"Write e.g. {key}={EXAMPLES[key]}")


def chosen_sizes(own: Mapping[str, str]) -> dict[str, tuple[Any, ...]]:
    """The values of ``CHOICES`` that a command line holds fixed."""
    return {key: _each(key, own[key]) for key in CHOICES if key in own}


def _each(key: str, text: str) -> tuple[Any, ...]:
    return tuple(READ[key](key, word.strip()) for word in text.split(","))


def _positive(own: Mapping[str, str], key: str) -> float | None:
    if key not in own:
        return None
    found = number(key, own[key])
    if not found > 0:
        raise ConfigError(key, own[key], "is above 0", f"Write e.g. {key}=2")
    return found


def _one_of(key: str, text: str, known: Mapping[str, Any]) -> Any:
    if text not in known:
        raise ConfigError(key, text, f"is one of {', '.join(known)}", did_you_mean(text, known))
    return known[text]
