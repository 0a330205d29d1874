"""Read a dataclass from a mapping: its annotations are the rules, as the signature of a block is.

A field may be a plain value, a dataclass, or a mapping of names to either. ``typed`` prepares the ``KEY=VALUE``
words of a command line; the mapping of a YAML file is read as it is.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

import yaml
from annotated_types import Ge

from blockwright.registry.errors import BlockError, ConfigError, did_you_mean
from blockwright.registry.limits import load_text
from blockwright.registry.ranges import parts
from blockwright.registry.schema import conforms, fault

T = TypeVar("T")


@dataclass(frozen=True)
class Remedy:
    """What to write instead of a refused or a missing value, where the annotation does not show it."""

    text: str


def read(cls: type[T], settings: Any, path: str = "") -> T:
    """Make a dataclass of a mapping.

    Args:
        cls: a dataclass; fields without a default are required
        settings: name of a field → plain value
        path: of the mapping, for messages; empty at the root

    Raises:
        ConfigError: no mapping, an unknown key, a missing one, a value that does not match its annotation, or one that
            the class refuses
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    if not isinstance(settings, Mapping):
        raise ConfigError(path, settings, "must be a mapping", f"Its keys are {', '.join(hints)}")
    for key, value in settings.items():
        if key not in hints:
            raise ConfigError(_join(path, key), value, "there is no such key", did_you_mean(key, hints))
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in settings and field.default is field.default_factory is MISSING:
            where = _join(path, field.name)
            raise ConfigError(where, None, "is required", _remedy(where, None, hints[field.name]))
    try:
        return cls(**{key: checked(value, hints[key], _join(path, key)) for key, value in settings.items()})
    except BlockError as error:
        raise ConfigError(_join(path, error.parameter), error.value, error.rule, error.remedy) from None


def checked(value: Any, hint: Any, path: str) -> Any:
    """Check a value, and read the dataclasses in its annotation.

    Raises:
        ConfigError: it does not match
    """
    plain, _ = parts(hint)
    origin, arguments = typing.get_origin(plain), typing.get_args(plain)
    if group := _dataclass(hint):
        return None if value is None and type(None) in _alternatives(plain) else read(group, value, path)
    if origin is dict and isinstance(value, Mapping):
        return {str(name): checked(inner, arguments[1], _join(path, name)) for name, inner in value.items()}
    if not conforms(value, hint):
        raise ConfigError(path, value, fault(value, hint), _remedy(path, value, hint))
    is_tuple = any(typing.get_origin(each) is tuple for each in (plain, *_alternatives(plain)))
    return tuple(value) if is_tuple and isinstance(value, list) else value


def typed(cls: type, words: Mapping[str, str]) -> dict[str, Any]:
    """Convert the words of a command line to the mapping that ``read`` takes.

    ``cache.bits`` is the field ``bits`` of the dataclass at ``cache``. ``read`` refuses text that no annotation takes.

    Args:
        cls: the dataclass
        words: dotted key → text
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    nested: dict[str, Any] = {}
    for name, group in _groups(hints).items():
        if inner := {key.removeprefix(f"{name}."): text for key, text in words.items() if key.startswith(f"{name}.")}:
            nested[name] = typed(group, inner)
    plain = {key: _from_text(text, hints.get(key, str)) for key, text in words.items() if "." not in key}
    return {**nested, **plain}


def keys(cls: type) -> list[str]:
    """The dotted keys that a command line may have for a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    groups = _groups(hints)
    return [
        key for name in hints for key in ([f"{name}.{k}" for k in keys(groups[name])] if name in groups else [name])
    ]


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _groups(hints: Mapping[str, Any]) -> dict[str, type]:
    return {name: group for name, hint in hints.items() if (group := _dataclass(hint)) is not None}


def _dataclass(hint: Any) -> type | None:
    """The dataclass of an annotation: itself, or that of ``Name | None``."""
    plain, _ = parts(hint)
    return next(
        (each for each in (plain, *_alternatives(plain)) if isinstance(each, type) and is_dataclass(each)), None
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def _remedy(path: str, value: Any, hint: Any) -> str:
    for alternative in (hint, *_alternatives(parts(hint)[0])):
        kind, metadata = parts(alternative)
        if texts := [each.text for each in metadata if isinstance(each, Remedy)]:
            return texts[0]
        if typing.get_origin(kind) is Literal:
            return did_you_mean(value, typing.get_args(kind))
        if least := [bound.ge for bound in metadata if isinstance(bound, Ge)]:
            return f"Write {path}={least[0]} or more"
        if kind is bool:
            return f"Write {path}=true or {path}=false"
    return f"Correct it, or leave out {path} for the default"


def _from_text(text: str, hint: Any) -> Any:
    """Convert text to the value that an annotation takes: ``2e6`` is an integer too, and ``1,2`` a list."""
    kinds = {parts(each)[0] for each in _alternatives(parts(hint)[0]) or (hint,)}
    if text == "null" and type(None) in kinds:
        return None
    if conforms(text, hint):
        return text
    lists = {each for each in kinds if typing.get_origin(each) in (list, tuple)}
    is_list = lists and ("," in text or kinds <= {*lists, type(None)})
    try:
        value = load_text(f"[{text}]" if is_list and not text.startswith("[") else text)
    except yaml.YAMLError:
        return text
    if isinstance(value, float) and value.is_integer() and not conforms(value, hint):
        return int(value)
    return value
