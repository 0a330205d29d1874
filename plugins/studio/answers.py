"""What the page asks about a choice: its picture and costs, its text and command. Runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blockwright import registry
from blockwright.blocks.model_config import read
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.models import load
from blockwright.plugins.studio import drawn
from blockwright.plugins.studio.choice import Choice
from blockwright.plugins.studio.forms import forms, plain
from blockwright.registry import ConfigError
from blockwright.training.configuration.composing import compose_config

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
        return {"model": plain(choice.composition), **drawn.draw(choice.composition, choice.preset)}
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
