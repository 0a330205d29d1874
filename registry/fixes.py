"""Register a block as another one with parameters fixed: ``register("attention", "mqa", fixes={"n_kv_heads": 1})``.

The class derives from the other one and describes itself in its docstring. It needs no constructor: its constructor is
the inherited one without the fixed parameters, in a configuration and in Python.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockwright.registry.errors import did_you_mean
from blockwright.registry.schema import conforms, fault, fixed_by


@dataclass(frozen=True)
class SameAs:
    """The value of a fixed parameter that equals another parameter: ``{"n_kv_heads": SameAs("n_heads")}``."""

    parameter: str

    def __str__(self) -> str:
        return self.parameter


def fix(cls: type, fixes: Mapping[str, Any]) -> None:
    """Remove fixed parameters from the constructor of a class, which then passes their values.

    Args:
        cls: derives from the class whose constructor takes them
        fixes: parameter, or field of a dataclass that is one → its value, or ``SameAs`` another parameter

    Raises:
        TypeError: no such parameter, a value outside its annotation, or a class that is already registered
    """
    if "Config" in vars(cls):
        raise TypeError(f"{cls.__qualname__} is registered under another name: derive a class, and fix that one's")
    constructor = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(constructor)
    hints = typing.get_type_hints(constructor, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    within = {f.name: name for name, group in groups.items() for f in dataclasses.fields(group)}
    for group in groups.values():
        hints |= typing.get_type_hints(group, include_extras=True)
    left = {name: p for name, p in signature.parameters.items() if name not in fixes}
    for name, value in fixes.items():
        if name not in (signature.parameters.keys() | within):
            known = did_you_mean(name, left.keys() - {"self"})
            raise TypeError(f"{cls.__qualname__} has no parameter {name!r} to fix. {known}")
        if isinstance(value, SameAs):
            if value.parameter not in left:
                raise TypeError(f"{cls.__qualname__} fixes {name} to {value}, not one of the remaining parameters")
        elif not conforms(value, hints.get(name, Any)):
            raise TypeError(f"{cls.__qualname__} fixes {name} to {value!r}: it {fault(value, hints[name])}")
    remaining = signature.replace(parameters=list(left.values()))

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> None:
        given = remaining.bind(*args, **kwargs)
        given.apply_defaults()
        fixed = fixed_values(fixes, given.arguments)
        for name, group in ((name, within[name]) for name in fixes if name in within):
            given.arguments[group] = dataclasses.replace(given.arguments[group], **{name: fixed.pop(name)})
        constructor(**given.arguments, **fixed)

    construct.__signature__ = remaining  # type: ignore[attr-defined]
    construct._fixes = {**fixed_by(constructor), **fixes}  # type: ignore[attr-defined]
    cls.__init__ = construct  # type: ignore[misc]


def fixed_values(fixes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fixed parameters → their values, given the other parameters."""
    return {name: given[value.parameter] if isinstance(value, SameAs) else value for name, value in fixes.items()}
