"""The catalogue as data, from which the page makes its forms: blocks, and parameters with type, range and help."""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union

from blockwright import registry
from blockwright.blocks.model_config import ModelConfig
from blockwright.registry import presets
from blockwright.registry.catalogue import Entry
from blockwright.registry.ranges import parts
from blockwright.registry.schema import Parameter, documented

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
