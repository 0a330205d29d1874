"""What the page asks about a choice: its picture and costs, its text and command. Runs in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from blockwright import registry
from blockwright.blocks.model_config import read
from blockwright.blocks.sample import remembering
from blockwright.lab.drawing import figures
from blockwright.lab.drawing.parts import Box, Scheme, Totals
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.models import load
from blockwright.plugins.studio.choice import Choice
from blockwright.plugins.studio.forms import forms, plain
from blockwright.registry import ConfigError
from blockwright.training.configuration.composing import compose_config

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
