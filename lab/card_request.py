"""The command line of ``blockwright describe``, parsed and validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.command import Parser, read_words
from blockwright.registry.reading import Key, Remedy, keys, typed
from blockwright.registry.reading import read as read_settings

Recipe = Literal["mixed", "fp32", "bf16"]
# Bytes per parameter while AdamW trains it.
RECIPES: dict[Recipe, dict[str, int]] = {
    "mixed": {"weights": 2, "gradients": 2, "master_weights": 4, "moments": 8},
    "fp32": {"weights": 4, "gradients": 4, "master_weights": 0, "moments": 8},
    "bf16": {"weights": 2, "gradients": 2, "master_weights": 0, "moments": 4},
}
Tokens = Annotated[int, Ge(1), Le(10_000_000), Remedy("Write a number of tokens, such as 4096")]


@dataclass(frozen=True)
class Options:
    """Settings of the figures of one model.

    Args:
        context: T, sequence length for FLOPs; None is ``usual_context``'s
        cache_context: tokens in the cache; None is ``context``
        cache_bits: bits per number in the cache
        recipe: one of ``RECIPES``
        gpus: number of GPUs that share the training state
    """

    context: Tokens | None = None
    cache_context: Annotated[Tokens | None, Key("cache.context")] = None
    cache_bits: Annotated[float, Gt(0), Le(64), Key("cache.bits"), Remedy("Write e.g. cache.bits=16")] = 16.0
    recipe: Annotated[Recipe, Key("training.recipe")] = "mixed"
    gpus: Annotated[int, Ge(1), Le(10_000_000)] = 8


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line."""

    models: list[str]
    options: list[Options]
    overrides: list[str]
    against: int
    as_json: bool
    plot: Path | None


OF_ALL = ("model", "against")  # keys of the models together, not of each


def read(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: no model, an unknown option, an invalid value
    """
    parser = Parser(prog="blockwright describe")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    flags, words = read_words(parser, arguments, (*OF_ALL, *keys(Options)))
    models = [name.strip() for name in words.settings.get("model", "").split(",") if name.strip()]
    if not models:
        raise ConfigError("model", None, "must name models", "Write e.g. model=deepseek_v2,deepseek_67b")
    for key, _, value in (word.partition("=") for word in words.overrides):
        if not key.lstrip("+~").startswith("model"):
            rule = "is no option and changes no model"
            raise ConfigError(key, value, rule, did_you_mean(key, [*OF_ALL, *keys(Options)]))
    return Request(
        models,
        _options(words.settings, models),
        words.overrides,
        _against(words.settings.get("against"), models),
        flags.json,
        None if flags.plot is None else _plot(flags.plot),
    )


def _plot(file: str) -> Path:
    if Path(file).suffix != ".svg":
        raise ConfigError("--plot", file, "must name a file ending in .svg", "Write --plot costs.svg")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError("--plot", file, "must be in a folder that exists", "Make the folder, or name another file")
    return Path(file)


def _options(settings: Mapping[str, str], models: Sequence[str]) -> list[Options]:
    columns = {key: _each(key, text, models) for key, text in settings.items() if key not in OF_ALL}
    rows = [{key: values[i] for key, values in columns.items()} for i in range(len(models))]
    return [read_settings(Options, typed(Options, row)) for row in rows]


def _each(key: str, text: str, models: Sequence[str]) -> list[str]:
    """One value for all models, or one per model."""
    values = [value.strip() for value in text.split(",")]
    if len(values) == 1:
        return values * len(models)
    if len(values) != len(models):
        rule = f"takes one value for all models or one for each of the {len(models)}"
        raise ConfigError(key, text, rule, f"Write {key}={','.join(values[:1] * len(models))}")
    return values


def _against(name: str | None, models: Sequence[str]) -> int:
    if name is None:
        return len(models) - 1
    if len(models) == 1:
        remedy = f"Leave it out, or write model={models[0]},{name}"
        raise ConfigError("against", name, "compares models, and one is described", remedy)
    if name not in models:
        raise ConfigError("against", name, "must be one of the models described", did_you_mean(name, models))
    return models.index(name)
