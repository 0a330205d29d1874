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


@dataclass(frozen=True)
class Remedy:
    """What to write instead of a refused value, in an annotation, where the rule does not say it."""

    text: str


def check_mapping(settings: Mapping[str, Any], hints: Mapping[str, Any], within: str = "") -> None:
    """Refuse unknown, missing and invalid settings, those of a ``TypedDict`` within included.

    Args:
        settings: as plain types
        hints: name → annotation of every setting
        within: path of the mapping, with a dot after it

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
        if typing.is_typeddict(hint) and isinstance(settings[key], Mapping):
            check_mapping(settings[key], typing.get_type_hints(hint, include_extras=True), f"{path}.")
        else:
            check_value(path, settings[key], dict if typing.is_typeddict(hint) else hint)


def check_value(path: str, value: Any, hint: Any) -> None:
    """Refuse a value that does not match an annotation.

    Raises:
        ConfigError: with the remedy of the annotation, if it has one
    """
    if not conforms(value, hint):
        raise ConfigError(path, value, fault(value, hint), _remedy(path, value, hint))


def _remedy(path: str, value: Any, hint: Any) -> str:
    """What to write instead: as the annotation says, or as its choices or its lower bound imply."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind, metadata in map(parts, alternatives):
        if texts := [each.text for each in metadata if isinstance(each, Remedy)]:
            return texts[0]
        if choices := ("true", "false") if kind is bool else get_args(kind) if get_origin(kind) is Literal else ():
            near = difflib.get_close_matches(str(value), choices, n=1)
            guess = f"Did you mean {near[0]!r}? " if near else ""
            return f"{guess}Write {' or '.join(f'{path}={choice}' for choice in choices)}"
        if bounds := [each.ge for each in metadata if isinstance(each, Ge)]:
            return f"Write {path}={bounds[0]}"
    return f"Leave out {path}=…"
