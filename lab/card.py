"""``blockwright describe``: its command line, and the cost card as a table with a column per model.

lab/describe.py measures, lab/report/single.py draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from rich import box
from rich.table import Table

from blockwright.blocks.cost import in_order
from blockwright.blocks.kernels.products import CACHED, MANY, few
from blockwright.blocks.kernels.timing import ROWS
from blockwright.blocks.on_gpu import CARDS
from blockwright.lab.report.words import percent
from blockwright.registry import ConfigError, did_you_mean, printing
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


def _exact(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def scaled(value: float) -> str:
    """Decimal prefixes, four digits: 65.86 G."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g}"


def in_bytes(value: float) -> str:
    """Binary prefixes: 8.438 GiB."""
    for size, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} B"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _in_two(value: str) -> str:
    return value.replace(" (", "\n(")


Row = tuple[str, str, Callable[[Any], str]]  # label, dotted key in the figures, format
Sections = tuple[tuple[Row, ...], ...]
BEYOND = "cache.elements_beyond_windows"  # left out where no model has windows
SIZE: Sections = (
    (
        ("parameters", "parameters.total", _exact),
        ("  active", "parameters.active", _exact),
        ("  in tables, of which a token reads rows", "parameters.tables", _exact),
        ("  active, no embedding", "parameters.active_without_embedding", _exact),
        ("  active, no embedding or head", "parameters.active_without_embedding_and_head", _exact),
    ),
)
RUNNING: Sections = (
    (
        ("tokens of the sequence", "flops.context", _text),
        ("FLOPs per token, forward", "flops.forward_per_token", scaled),
        ("FLOPs per token, training", "flops.training_per_token", scaled),
        ("  per sequence, DeepSeekMoE's formula", "flops.deepseek_moe_formula", scaled),
    ),
    (
        ("cache numbers per token", "cache.elements_per_token", _exact),
        ("  beyond the windows", BEYOND, _exact),
        ("  constant numbers besides", "cache.elements_constant", _exact),
        ("cache bytes per token, fp32", "cache.bytes_per_token.fp32", _exact),
        ("  bf16", "cache.bytes_per_token.bf16", _exact),
        ("  fp8", "cache.bytes_per_token.fp8", _exact),
        ("  bits chosen", "cache.bits", _text),
        ("  bytes at these bits", "cache.bytes_per_token.at_bits", _exact),
        ("  as stored, with scales", "cache.bytes_per_token.stored", _exact),
        ("tokens cached", "cache.context", _text),
        ("  bytes in bf16", "cache.bytes_at_context.bf16", in_bytes),
        ("  bytes at the bits chosen", "cache.bytes_at_context.at_bits", in_bytes),
        ("  as stored, with scales", "cache.bytes_at_context.stored", in_bytes),
    ),
)
EXAMPLE = {  # figure of an example of an input → its label and format
    "tokens": ("tokens", _exact),
    "embedding_flops": ("FLOPs of embedding it", scaled),
    "reading_flops": ("FLOPs of reading it", scaled),
    "cache_bytes": ("cache bytes, bf16", in_bytes),
}
MACHINE: Sections = (
    (
        ("kernels, here", "kernels.device", _text),
        ("  attention", "kernels.attention", _text),
        ("  latent attention", "kernels.latent_attention", _text),
        ("  attention on codes", "kernels.coded_attention", _text),
        ("  recurrence", "kernels.recurrence", _text),
        ("  encoder attention", "kernels.encoder_attention", _text),
        ("  experts", "kernels.experts", _text),
        ("  cross entropy", "kernels.cross_entropy", _text),
        ("  RMS norm", "kernels.rms_norm", _text),
        ("  gated SiLU", "kernels.gated_silu", _text),
        ("  rotation", "kernels.rotation", _text),
        ("fp32 products, here", "kernels.products.chosen", _text),
        *((f"  {of}", f"kernels.products.{of}", _in_two) for of in (MANY, *map(few, ROWS), CACHED)),
        *((f"attention on {card}, a forecast", f"kernels.attention_on.{card}.all", _text) for card in CARDS),
    ),
    (
        ("weights, fp32", "weights.bytes.fp32", in_bytes),
        ("  bf16", "weights.bytes.bf16", in_bytes),
        ("  fp8", "weights.bytes.fp8", in_bytes),
        ("  of them tables, bf16", "weights.table_bytes.bf16", in_bytes),
        ("training state (training.recipe)", "training.recipe", _text),
        ("  bytes a parameter", "training.bytes_per_parameter", _text),
        ("  weights", "training.bytes.weights", in_bytes),
        ("  gradients", "training.bytes.gradients", in_bytes),
        ("  master weights", "training.bytes.master_weights", in_bytes),
        ("  AdamW moments", "training.bytes.moments", in_bytes),
        ("  total", "training.bytes.total", in_bytes),
        ("  GPUs (training.gpus)", "training.gpus", _text),
        ("  per GPU, evenly sharded", "training.bytes_per_gpu", in_bytes),
    ),
)
# Settings, not measurements.
SETTINGS = {"flops.context", "cache.bits", "cache.context", "training.gpus", "training.bytes_per_parameter"}
NOTE = (
    "FLOPs: attention not halved for causality. Training: with all gradients and multi-token prediction; most products "
    "have two in the backward."
)
# Left out where no model has them, with all keys that begin so.
OPTIONAL = (
    "kernels.products.",
    "parameters.tables",
    "weights.table_bytes",
    "parameters.families.",
    "inputs.",
    "cache.elements_constant",
    "cache.bytes_per_token.stored",
    "cache.bytes_at_context.stored",
)
CHOSEN = {"cache.bits", "cache.bytes_per_token.at_bits", "cache.bytes_at_context.at_bits"}  # left out at 16 bits


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"cache": {"bits": 6}} → {"cache.bits": 6}."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def show(document: Mapping[str, Any]) -> None:
    """Print the card."""
    printing.show(table(document))


def table(document: Mapping[str, Any]) -> Table:
    """A column per model, and beside each compared one its relative difference."""
    models = [flat(model) for model in document["models"]]
    compared = {id(m): c["change"] for m, c in _comparisons(document, models)}
    card = Table(box=box.SIMPLE_HEAD, highlight=False, caption=NOTE, caption_justify="left")
    card.add_column("")
    for model in models:
        card.add_column(str(model["model"]), justify="right", no_wrap=True)
        if id(model) in compared:
            card.add_column(f"against\n{document['against']}", justify="right", style="cyan", no_wrap=True)
    for section in _sections(document["models"]):
        for label, key, written in section:
            if key.startswith(OPTIONAL) and not any(model.get(key) for model in models):
                continue
            if key == BEYOND and all(model[key] == model["cache.elements_per_token"] for model in models):
                continue
            if key in CHOSEN and all(model["cache.bits"] == 16 for model in models):
                continue
            cells = [label]
            for model in models:
                cells.append("none" if model.get(key) is None else written(model[key]))
                if id(model) in compared:
                    cells.append(_percent(compared[id(model)].get(key)))
            card.add_row(*cells)
        card.add_section()
    return card


def _sections(models: Sequence[Mapping[str, Any]]) -> list[Sequence[Row]]:
    """The rows of a card of these models, with those of their families and their inputs."""
    names = in_order(family for model in models for family in model["parameters"]["families"])
    families = [(f"  {name.replace('_', ' ')}", f"parameters.families.{name}", _exact) for name in names]
    examples = {
        (kind, name): figures
        for model in models
        for kind, of_kind in model["inputs"].items()
        for name, figures in of_kind.items()
    }
    inputs = [_example(*example, figures) for example, figures in examples.items()]
    return [*SIZE, families, *RUNNING, *inputs, *MACHINE]


def _example(kind: str, name: str, figures: Mapping[str, Any]) -> list[Row]:
    """The rows of an example of an input."""
    rows, start = list[Row](), f"{kind}, {name}: "
    for figure in figures:
        label, written = EXAMPLE.get(figure, (figure, _exact))
        rows.append((f"{'  ' if rows else start}{label}", f"inputs.{kind}.{name}.{figure}", written))
    return rows


def _comparisons(document: Mapping[str, Any], models: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Any]]:
    """All models but the reference, each with its changes."""
    return [(models[change["index"]], change) for change in document["changes"]]


def _percent(change: float | None) -> str:
    return "" if change is None else percent(change)
