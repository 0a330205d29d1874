"""Classes that a folder from outside may name in ``_target_``: those that installed code declares.

A run's folder may be untrusted, and its configuration can name any class. Commands that only read such a folder build
nothing but the classes declared here. A package of your own declares its classes where its entry point of
``blockwright.blocks`` imports them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, TypeVar

from blockwright.registry.catalogue import load

T = TypeVar("T", bound=type)
_declared: dict[str, type] = {}


def readable(cls: T) -> T:
    """Declare that the decorated class may be built from the plain values of an untrusted file.

    Its constructor, whatever it is given, reads no file, runs nothing and imports nothing that a value names.
    """
    _declared[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def find_readable(target: Any, contract: type) -> type | None:
    """The declared class of a dotted path; None for any other. Nothing is imported because a path names it, but the
    modules of the contract's own package.

    Args:
        target: from the file
        contract: the base class that it has to derive from
    """
    load()  # plug-ins
    package = contract.__module__.rpartition(".")[0]
    own = pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
    module = str(target).rpartition(".")[0]
    if module in {each.name for each in own}:
        importlib.import_module(module)
    found = _declared.get(str(target))
    return found if found is not None and issubclass(found, contract) else None
