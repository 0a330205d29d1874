"""Check values of a configuration against annotations, with a remedy for each."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge

from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.ranges import parts
from blockwright.registry.schema import conforms, fault

UNIONS = (Union, types.UnionType)


@dataclass(frozen=True)
class Remedy:
    """What to write instead of a refused value, in an annotation, where the rule does not say it."""

    text: str


def check_mapping(
    settings: Mapping[str, Any], hints: Mapping[str, Any], within: str = "", open_ended: tuple[type, ...] = ()
) -> None:
    """Refuse unknown, missing and invalid settings, those of a ``TypedDict`` within included.

    Args:
        settings: as plain types
        hints: name → annotation of every setting
        within: path of the mapping, with a dot after it
        open_ended: types of mappings that may have further settings

    Raises:
        ConfigError
    """
    for key in settings:
        if key not in hints:
            raise ConfigError(within + key, settings[key], "there is no such setting", did_you_mean(key, hints))
    for key, hint in hints.items():
        path = within + key
        if key not in settings:
            remedy = f"Add it: +{path}=…, or leave out what removes it (e.g. ~{path})"
            raise ConfigError(path, None, "every run has this setting", remedy)
        value = settings[key]
        if typing.is_typeddict(hint) and isinstance(value, Mapping):
            inner = typing.get_type_hints(hint, include_extras=True)
            known = value if hint not in open_ended else {k: v for k, v in value.items() if k in inner}
            check_mapping(known, inner, f"{path}.", open_ended)
        else:
            check_value(path, value, dict if typing.is_typeddict(hint) else hint)


def check_value(path: str, value: Any, hint: Any) -> None:
    """Refuse a value that does not match an annotation.

    Raises:
        ConfigError: with the remedy of the annotation, if it has one
    """
    if not conforms(value, hint):
        raise ConfigError(path, value, fault(value, hint), _remedy(path, hint, value))


def _remedy(path: str, hint: Any, value: Any) -> str:
    """What to write instead: as the annotation says, or as its choices or its lower bound imply."""
    options = [parts(option) for option in get_args(hint) if get_origin(hint) in UNIONS] or [parts(hint)]
    metadata = [each for _, more in options for each in more]
    for each in metadata:
        if isinstance(each, Remedy):
            return each.text
    choices = [choice for plain, _ in options for choice in _choices(plain)]
    if choices:
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        hint_of = f"Did you mean {near[0]!r}? " if near else ""
        return f"{hint_of}Write {' or '.join(f'{path}={choice}' for choice in choices)}"
    bounds = [each.ge for each in metadata if isinstance(each, Ge)]
    return f"Write {path}={bounds[0]}" if bounds else f"Leave out {path}=…"


def _choices(hint: Any) -> tuple[Any, ...]:
    return ("true", "false") if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
