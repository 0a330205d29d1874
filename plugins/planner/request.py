"""The command line of ``blockwright plan``, parsed and validated."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge

from blockwright.plugins.planner.hardware import Hardware, hardware
from blockwright.plugins.planner.layout import Precision
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.command import Parser, read_words
from blockwright.registry.ranges import Count, Positive
from blockwright.registry.reading import Key, Remedy, keys, read, typed
from blockwright.training.parallel.recompute import Recompute

BATCH = 8  # default number of sequences per GPU
FLAGS = ("--explain", "--generation", "--json")


@dataclass(frozen=True)
class Choices:
    """Sizes of a layout that are not searched over: one value or several; None: the usual ones."""

    tensor: tuple[Count, ...] | None = None
    pipeline: tuple[Count, ...] | None = None
    context: tuple[Count, ...] | None = None
    expert: tuple[Count, ...] | None = None
    interleave: tuple[Count, ...] | None = None
    micro_batch: tuple[Count, ...] | None = None
    shard: tuple[bool, ...] | None = None
    recompute: tuple[Recompute, ...] | None = None

    @property
    def chosen(self) -> dict[str, tuple[Any, ...]]:
        """Name → values, of those that are fixed."""
        values = {each.name: getattr(self, each.name) for each in fields(Choices)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Cluster(Choices):
    """The GPUs, and sizes of the layout on them.

    Args:
        gpus: how many
        gpu: name of a device
    """

    gpus: Annotated[Count, Remedy("Write e.g. gpus=1024")]
    gpu: Annotated[str, Remedy("Write e.g. gpu=h800")]

    @property
    def device(self) -> Hardware:
        """The device.

        Raises:
            ConfigError: there is none of this name
        """
        return hardware(self.gpu)


@dataclass(frozen=True, kw_only=True)
class Settings(Cluster):
    """The settings of a command line; None leaves the model to decide.

    Args:
        model: preset, run, checkpoint or composition
        tokens: of the training
        batch: sequences of a step; None: ``BATCH`` per GPU
        length: of a sequence, in tokens
        precision: of the matrix products
        gpu_hour, kwh: prices in any currency
        overhead: watts of the whole per watt of the GPUs: hosts, network, cooling
    """

    model: Annotated[str, Remedy("Write e.g. model=deepseek_v2")]
    tokens: Positive | None = None
    batch: Count | None = None
    length: Annotated[int, Ge(2)] | None = None
    precision: Precision = "bf16"
    gpu_hour: Annotated[Positive | None, Key("price.gpu_hour")] = None
    kwh: Annotated[Positive | None, Key("price.kwh")] = None
    overhead: Annotated[Positive, Key("power.overhead")] = 1.3
    weight_bits: Annotated[Positive, Key("weights.bits")] = 16.0
    cache_bits: Annotated[Positive, Key("cache.bits")] = 16.0


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line."""

    settings: Settings
    overrides: list[str]
    show: Literal["layouts", "generation"]
    explain: bool
    as_json: bool

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return self.settings.batch or BATCH * self.settings.gpus


OF_TOKENS = ("price.gpu_hour", "price.kwh", "power.overhead")  # factors of the number of tokens
OF_LAYOUTS = ("tokens", "batch", "precision", *OF_TOKENS, *keys(Choices), "--explain")
OF_GENERATION = ("weights.bits", "cache.bits")


def read_request(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: no model or GPUs, an unknown option, an invalid value, or an option without effect
    """
    parser = Parser(prog="blockwright plan")
    for flag in FLAGS:
        parser.add_argument(flag, action="store_true")
    flags, words = read_words(parser, arguments, keys(Settings))
    for word in words.overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if not key.startswith("model"):
            raise ConfigError(key, value, "there is no such option", did_you_mean(key, keys(Settings)))
    settings = read(Settings, typed(Settings, words.settings))
    hardware(settings.gpu)
    show: Literal["layouts", "generation"] = "generation" if flags.generation else "layouts"
    _refuse_without_effect([*words.settings, *["--explain"] * flags.explain], show)
    return Request(settings, words.overrides, show, flags.explain, flags.json)


def _refuse_without_effect(options: Collection[str], show: Literal["layouts", "generation"]) -> None:
    other, rule, remedy = {
        "generation": (OF_LAYOUTS, "is of a training, which --generation leaves out", "Leave one of them out"),
        "layouts": (OF_GENERATION, "is of generation, and a training is planned", "Leave it out, or add --generation"),
    }[show]
    for key in options:
        if key in other:
            raise ConfigError(key, "…", rule, remedy)
        if key in OF_TOKENS and "tokens" not in options:
            raise ConfigError(
                key, "…", "multiplies the tokens of a training, which are missing", "Add e.g. tokens=1e12"
            )
