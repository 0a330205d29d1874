"""What the page asks: its forms, and of a choice its picture and costs, its text and command.

Forms are the catalogue as data: blocks, and parameters with type, range and help. All of it runs in a process of its
own.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union

from blockwright import registry
from blockwright.blocks.compose import ModelConfig, read
from blockwright.blocks.sample import remembering
from blockwright.lab.drawing import figures
from blockwright.lab.drawing.parts import Box, Scheme, Totals
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.models import load
from blockwright.plugins.studio.choice import Choice
from blockwright.registry import ConfigError, presets
from blockwright.registry.catalogue import Entry
from blockwright.registry.ranges import parts
from blockwright.registry.schema import Parameter, documented
from blockwright.training.configuration.composing import compose_config

PAPER = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


def forms() -> dict[str, Any]:
    """All that the page knows of the registry.

    Returns:
        ``presets``: name, summary; ``settings``: parameters of a model that are no block; ``kinds``: kind →
        its meaning, whether layers may differ in it, and its blocks by name
    """
    registry.load()
    return {
        "presets": [{"name": name, "summary": presets.find(name).summary} for name in presets.names()],
        "settings": _settings(),
        "kinds": {kind: _kind(kind) for kind in registry.kinds()},
    }


def _kind(kind: str) -> dict[str, Any]:
    family = registry.find_family(kind)
    blocks = {name: _block(registry.lookup(kind, name)) for name in registry.names(kind)}
    return {"about": _first_sentence(family.contract), "in_layers": family.in_layers, "blocks": blocks}


def _block(entry: Entry) -> dict[str, Any]:
    schema = entry.schema
    paper = PAPER.search(inspect.getdoc(entry.cls) or "")
    return {
        "about": schema.summary,
        "provider": entry.provider,
        "paper": f"arXiv {paper[1]}" if paper else None,
        "parameters": [_parameter(p) for p in schema.parameters.values()],
    }


def _parameter(p: Parameter) -> dict[str, Any]:
    return {
        "name": p.name,
        "type": p.type,
        "required": p.required,
        "default": None if p.required else plain(p.default),
        "help": p.description,
        "choices": choices(p.annotation),
        "child": p.child,
        "optional": p.optional,
        "many": p.many,
    }


def _settings() -> list[dict[str, Any]]:
    """The keys of a model that are single values."""
    hints, help_of = typing.get_type_hints(ModelConfig, include_extras=True), documented(ModelConfig)
    plain = typing.get_type_hints(ModelConfig)
    made = []
    for each in fields(ModelConfig):
        if each.name in ("format", "init", "mtp", "variants", "overrides", "layout"):
            continue
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        text = help_of.get(each.name, "")
        made.append(_parameter(Parameter(each.name, plain[each.name], hints[each.name], default, None, text)))
    return made


def choices(annotation: Any) -> list[Any] | None:
    """The values of an annotation that allows only some; None for any other."""
    hint, _ = parts(annotation)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return list(arguments)
    if hint is bool:
        return [True, False]
    if hint is type(None):
        return [None]
    if origin in (Union, types.UnionType):
        of_each = [choices(argument) for argument in arguments]
        return None if None in of_each else [value for some in of_each for value in some or ()]
    return None


def _first_sentence(contract: type) -> str:
    return (inspect.getdoc(contract) or "").replace("``", "").partition("\n\n")[0].replace("\n", " ")


def plain(value: Any) -> Any:
    """A value as JSON has it: infinity and what is of no plain type as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    finite = not isinstance(value, float) or math.isfinite(value)  # JSON has no infinity
    return value if finite and isinstance(value, bool | int | float | str | type(None)) else str(value)


# --- the picture of a composition, its costs, and where in the composition each box is written ------------------------


# A path of an error message: what only ``overrides`` explains is ``model.ffn (layer 3)``.
WRITTEN = re.compile(r"model\.([\w.]+)( \(layer \d+\))?")
MOST = 2000  # costs of parts that are remembered
_costs: dict[Any, int] = {}  # of this process, which draws models that differ in one part
FIGURES = ("parameters", "active", "forward_flops", "cache_bytes")  # those of the picture, in its order
OF_NO_BLOCK = {"embedding": "d_model", "head": "vocab_size"}  # kind of a box → the setting by which it is exchanged


def draw(model: Mapping[str, Any], title: str) -> dict[str, Any]:
    """A model as the page shows it.

    Args:
        model: a composition
        title: its name

    Returns:
        ``picture``, an SVG; ``boxes``: path of a box → path in the composition; ``totals``: figures of the whole

    Raises:
        ConfigError: the composition is refused
    """
    if len(_costs) > MOST:
        _costs.clear()
    with remembering(_costs):
        found = scheme(model, title)
    return {"picture": picture(found), "boxes": places(found), "totals": _totals(found.totals)}


def _totals(found: Totals) -> dict[str, dict[str, Any]]:
    """Name → value of each figure, as the picture writes it, and what it is a figure of."""
    written = zip(FIGURES, figures.totals(found), strict=True)
    return {name: {"value": getattr(found, name), "text": text, "of": of} for name, (text, of) in written}


def places(of: Scheme) -> dict[str, str]:
    """Path of each box → path in the composition. A child that is the model's own is written there."""
    return {box.path: place for box in of.boxes() if (place := _place(box))}


def _place(box: Box) -> str:
    written = WRITTEN.fullmatch(box.written)
    if written is None:
        return OF_NO_BLOCK.get(box.kind, "")
    return "overrides" if written[2] else written[1]


Answer = dict[str, Any]
OF_BLOCKS = ("layout", "variants", "overrides")


def answer(request: Mapping[str, Any]) -> Answer:
    """The answer to a request: a mapping of plain values; ``refusal`` where a ConfigError is raised.

    Args:
        request: ``what``, a key of ``QUESTIONS``; ``preset`` and ``changes`` of the choice
    """
    try:
        return QUESTIONS[request["what"]](request)
    except ConfigError as error:
        return {"refusal": refusal(error)}


def refusal(error: ConfigError) -> Answer:
    """A refusal as the page shows it: its parts, and the message of the command line."""
    return {"path": error.path, "rule": error.rule, "remedy": error.remedy, "text": error.render()}


def _choice(request: Mapping[str, Any]) -> Choice:
    return Choice(str(request["preset"]), {str(path): str(text) for path, text in request["changes"].items()})


def _forms(_: Mapping[str, Any]) -> Answer:
    return forms()


def _draw(request: Mapping[str, Any]) -> Answer:
    """The composition, its picture, and which path each box is of; a refusal besides the composition as chosen."""
    choice = _choice(request)
    try:
        return {"model": plain(choice.composition), **draw(choice.composition, choice.preset)}
    except ConfigError as error:
        return {"model": _attempted(choice), "refusal": refusal(as_on_the_command_line(choice, error))}


def _attempted(choice: Choice) -> Answer | None:
    """The composition of a choice that is refused, so that the form shows it; None if it has none."""
    try:
        return plain(choice.composition)
    except ConfigError:
        return None


def as_on_the_command_line(choice: Choice, error: ConfigError) -> ConfigError:
    """What ``blockwright train`` with the same overrides is refused with.

    Args:
        choice: that is refused
        error: of its composition. Mostly the same; but the command line may refuse a value before a block sees it
    """
    try:
        load(choice.preset, choice.overrides[1:])
    except ConfigError as refused:
        return refused
    return error


def _copy(request: Mapping[str, Any]) -> Answer:
    """The choice as text and as command, which have been composed to the same."""
    choice = _choice(request)
    if not same(choice.text, compose_config(choice.overrides).model):
        rule = "cannot be written as overrides"
        raise ConfigError("command", choice.command, rule, "Copy it as YAML: model=file model.file=FILE")
    return {"yaml": choice.text, "command": choice.command}


def same(*models: Any) -> bool:
    """Whether compositions build the same: the same blocks with the same settings, and the same around them.

    Args:
        models: texts, mappings or nodes

    Raises:
        ConfigError: one is refused
    """
    built = [(_bare(scheme(model).plain()), _around(model)) for model in map(read, models)]
    return all(each == built[0] for each in built)


def _bare(value: Any) -> Any:
    """Data of a scheme without the labels, which say less than the settings do."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items() if key != "lines"}
    return [_bare(inner) for inner in value] if isinstance(value, list | tuple) else value


def _around(model: Mapping[str, Any]) -> Answer:
    """The settings of a complete composition that are no blocks; what layouts and the like make is in the blocks."""
    return {key: value for key, value in model.items() if key not in (*registry.kinds(), *OF_BLOCKS)}


QUESTIONS: dict[str, Callable[[Mapping[str, Any]], Answer]] = {"forms": _forms, "draw": _draw, "copy": _copy}
