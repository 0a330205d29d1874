"""Constructors that check the ranges in their annotations when called from Python too."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import numbers
from blockwright.registry.schema import conforms, fault

T = TypeVar("T", bound=type)
Refuse = Callable[[str, Any, str, str], Exception]  # parameter, value, rule, remedy → the exception


def enforced(refuse: Refuse | str) -> Callable[[T], T]:
    """Make the constructor of a class refuse numbers outside its annotations. Other types are not checked.

    Args:
        refuse: creates the exception; or the configuration path under which a ConfigError names the parameter
    """
    path = refuse
    make: Refuse = (lambda name, *rest: ConfigError(f"{path}.{name}", *rest)) if isinstance(refuse, str) else refuse

    def enforce(cls: T) -> T:
        constructor = cls.__init__  # type: ignore[misc]
        if not hasattr(constructor, "_enforced"):
            # The fields of a dataclass may be annotated in the module of another, which it derives from.
            annotated = cls if dataclasses.is_dataclass(cls) else constructor
            cls.__init__ = _enforcing(constructor, annotated, make)  # type: ignore[misc]
        return cls

    return enforce


def _enforcing(constructor: Any, annotated: Any, refuse: Refuse) -> Any:
    signature = inspect.signature(constructor)

    @functools.cache
    def hints() -> dict[str, Any]:
        found = typing.get_type_hints(annotated, include_extras=True)
        return {name: hint for name, hint in found.items() if any(numbers(hint))}

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # Python's own error follows
            given = {}
        for name, value in given.items():
            if name in hints() and not conforms(value, hints()[name]):
                raise refuse(name, value, fault(value, hints()[name]), "Write another, or leave it out for the default")
        constructor(self, *args, **kwargs)

    construct._enforced = True  # type: ignore[attr-defined]
    return construct
