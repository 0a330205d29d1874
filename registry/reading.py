"""Read a dataclass from a mapping: its annotations are the rules, as the signature of a block is.

A field may be a plain value, a dataclass, or a mapping of names to either. ``typed`` prepares the ``KEY=VALUE`` words
of a command line; the mapping of a YAML file is read as it is.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

import yaml
from annotated_types import Ge

from blockwright.registry.errors import BlockError, ConfigError, did_you_mean
from blockwright.registry.limits import load_text
from blockwright.registry.ranges import parts
from blockwright.registry.schema import conforms, fault, in_words

T = TypeVar("T")


@dataclass(frozen=True)
class Remedy:
    """What to write instead of a refused or a missing value, where the annotation does not show it."""

    text: str


@dataclass(frozen=True)
class Key:
    """The key of a field, if it is not the field's name: ``cache.bits``."""

    text: str


def read(cls: type[T], settings: Any, path: str = "") -> T:
    """Make a dataclass of a mapping.

    Args:
        cls: a dataclass; fields without a default are required
        settings: key of a field → plain value
        path: of the mapping, for messages; empty at the root

    Raises:
        ConfigError: no mapping, an unknown key, a missing one, a value that does not match its annotation, or one that
            the class refuses
    """
    known = hinted_fields(cls)
    if not isinstance(settings, Mapping):
        raise ConfigError(path, settings, "must be a mapping", f"Its keys are {', '.join(known)}")
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(_join(path, key), value, "there is no such key", did_you_mean(key, known))
    for key, (field, hint) in known.items():
        if key not in settings and field.default is field.default_factory is MISSING:
            remedy = _own_remedy(hint) or f"Write {_join(path, key)}=<{in_words(hint)}>"
            raise ConfigError(_join(path, key), None, "is required", remedy)
    values = {known[key][0].name: checked(value, known[key][1], _join(path, key)) for key, value in settings.items()}
    try:
        return cls(**values)
    except BlockError as error:
        raise ConfigError(_join(path, error.parameter), error.value, error.rule, error.remedy) from None


def checked(value: Any, hint: Any, path: str) -> Any:
    """Check a value, and read the dataclasses in its annotation. The only item of a tuple may stand alone.

    Raises:
        ConfigError: it does not match
    """
    plain, _ = parts(hint)
    kinds = [parts(each)[0] for each in _members(hint)]
    if value is None and type(None) in kinds:
        return None
    if group := next((each for each in kinds if isinstance(each, type) and is_dataclass(each)), None):
        return read(group, value, path)
    if typing.get_origin(plain) in (dict, Mapping) and isinstance(value, Mapping):
        return {str(key): checked(each, typing.get_args(plain)[1], _join(path, key)) for key, each in value.items()}
    is_tuple = all(each is type(None) or typing.get_origin(each) is tuple for each in kinds)
    given = [value] if is_tuple and not isinstance(value, list | tuple) else value
    if not conforms(given, hint):
        raise ConfigError(path, value, fault(value, hint), _remedy(path, value, hint))
    return tuple(given) if is_tuple else value


def typed(cls: type, words: Mapping[str, str]) -> dict[str, Any]:
    """Convert the words of a command line to the mapping that ``read`` takes.

    Args:
        cls: the dataclass
        words: key of a field → text; text that no annotation takes is left to ``read``, which refuses it
    """
    known = hinted_fields(cls)
    return {key: _from_text(text, known[key][1]) if key in known else text for key, text in words.items()}


def keys(cls: type) -> list[str]:
    """The keys of the fields of a dataclass."""
    return list(hinted_fields(cls))


def hinted_fields(cls: type) -> dict[str, tuple[Field[Any], Any]]:
    """Key → field and annotation."""
    known = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        renamed = [each.text for each in parts(hints[field.name])[1] if isinstance(each, Key)]
        known[renamed[0] if renamed else field.name] = field, hints[field.name]
    return known


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    plain, _ = parts(hint)
    return typing.get_args(plain) if typing.get_origin(plain) in (Union, types.UnionType) else (hint,)


def _own_remedy(hint: Any) -> str | None:
    return next((each.text for each in parts(hint)[1] if isinstance(each, Remedy)), None)


def _remedy(path: str, value: Any, hint: Any) -> str:
    for member in (hint, *_members(hint)):
        kind, metadata = parts(member)
        if text := _own_remedy(member):
            return text
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            if len(choices) > 3:
                return did_you_mean(value, choices)
            near = difflib.get_close_matches(str(value), choices, n=1)
            guess = f"Did you mean {near[0]!r}? " if near else ""
            return f"{guess}Write {' or '.join(f'{path}={choice}' for choice in choices)}"
        if least := [bound.ge for bound in metadata if isinstance(bound, Ge)]:
            return f"Write {path}={least[0]}"
        if kind is bool:
            return f"Write {path}=true or {path}=false"
    return f"Correct it, or leave out {path} for the default"


def _from_text(text: str, hint: Any) -> Any:
    """Convert text to the value that an annotation takes: ``2e6`` is an integer too, and ``1,2`` a list."""
    kinds = [parts(each)[0] for each in _members(hint)]
    if text == "null" and type(None) in kinds:
        return None
    if conforms(text, hint):
        return text
    is_list = "," in text and any(typing.get_origin(each) in (list, tuple) for each in kinds)
    try:
        value = load_text(f"[{text}]" if is_list and not text.startswith("[") else text)
    except yaml.YAMLError:
        return text
    is_whole = isinstance(value, float) and value.is_integer() and not conforms(value, hint)
    return int(value) if is_whole else value
