"""The command line of ``blockwright describe``, parsed and validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.arguments import read_arguments

# Bytes per parameter while AdamW trains it.
RECIPES = {
    "mixed": {"weights": 2, "gradients": 2, "master_weights": 4, "moments": 8},
    "fp32": {"weights": 4, "gradients": 4, "master_weights": 0, "moments": 8},
    "bf16": {"weights": 2, "gradients": 2, "master_weights": 0, "moments": 4},
}


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

    context: int | None = None
    cache_context: int | None = None
    cache_bits: float = 16.0
    recipe: str = "mixed"
    gpus: int = 8


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line."""

    models: list[str]
    options: list[Options]
    overrides: list[str]
    against: int
    as_json: bool
    plot: Path | None


def _whole(value: float) -> bool:
    return 1 <= value <= 10_000_000 and value == int(value)


NUMBERS: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "context": ("context", _whole, "a number of tokens, from 1 to ten million"),
    "cache.context": ("cache_context", _whole, "a number of tokens, from 1 to ten million"),
    "cache.bits": ("cache_bits", lambda bits: 0 < bits <= 64, "a number of bits, above 0 and at most 64"),
    "gpus": ("gpus", _whole, "a number of GPUs, from 1 to ten million"),
}
KEYS = (*NUMBERS, "training.recipe", "against")


def read(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: no model, an unknown option, an invalid value
    """
    given = read_arguments(arguments, options=(*KEYS, "model"), flags=("--json", "--plot=FILE"))
    own = dict(given.options)
    models = [name.strip() for name in own.pop("model", "").split(",") if name.strip()]
    if not models:
        raise ConfigError("model", None, "must name models", "Write e.g. model=deepseek_v2,deepseek_67b")
    for key, _, value in (word.partition("=") for word in given.overrides):
        if key.partition(".")[0] in ("cache", "training", "context", "gpus", "against", "models"):
            raise ConfigError(key, value, "there is no such option", did_you_mean(key, [*KEYS, "model"]))
        if not key.lstrip("+~").startswith("model"):
            rule = "changes no model, and costs are those of models alone"
            raise ConfigError(key, value, rule, "Leave it out; overrides begin with model, as model.n_layers=4")
    plot = _plot(given.flags["--plot"]) if "--plot" in given.flags else None
    return Request(models, _options(own, models), given.overrides, _against(own, models), "--json" in given.flags, plot)


def _plot(file: str) -> Path:
    if Path(file).suffix != ".svg":
        raise ConfigError("--plot", file, "must name a file ending in .svg", "Write --plot costs.svg")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError("--plot", file, "must be in a folder that exists", "Make the folder, or name another file")
    return Path(file)


def _options(own: Mapping[str, str], models: Sequence[str]) -> list[Options]:
    columns: dict[str, list[Any]] = {}
    for key, (name, fits, rule) in NUMBERS.items():
        if key in own:
            texts = _each(key, own[key], models)
            columns[name] = [_number(key, text, fits, rule) for text in texts]
    if "training.recipe" in own:
        columns["recipe"] = _each("training.recipe", own["training.recipe"], models)
        for recipe in columns["recipe"]:
            if recipe not in RECIPES:
                remedy = did_you_mean(recipe, RECIPES)
                raise ConfigError("training.recipe", recipe, "there is no such recipe", remedy)
    return [Options(**{name: values[i] for name, values in columns.items()}) for i in range(len(models))]


def _each(key: str, text: str, models: Sequence[str]) -> list[str]:
    """One value for all models, or one per model."""
    values = [value.strip() for value in text.split(",")]
    if len(values) == 1:
        return values * len(models)
    if len(values) != len(models):
        rule = f"takes one value for all models or one for each of the {len(models)}"
        raise ConfigError(key, text, rule, f"Write {key}={','.join(values[:1] * len(models))}")
    return values


def _number(key: str, text: str, fits: Callable[[float], bool], rule: str) -> float:
    try:
        value = float(text)
        good = fits(value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise ConfigError(key, text, f"is {rule}", f"Write e.g. {key}=16")
    return int(value) if value == int(value) else value


def _against(own: Mapping[str, str], models: Sequence[str]) -> int:
    if "against" in own and len(models) == 1:
        remedy = f"Leave it out, or write model={models[0]},{own['against']}"
        raise ConfigError("against", own["against"], "compares models, and one is described", remedy)
    name = own.get("against", models[-1])
    if name not in models:
        raise ConfigError("against", name, "must be one of the models described", did_you_mean(name, models))
    return len(models) - 1 if "against" not in own else models.index(name)
