"""Classes that a folder from outside may name in ``_target_``: those that installed code declares.

A run's folder may be untrusted, and its configuration can name any class. Commands that only read such a folder build
nothing but the classes declared here. A package of your own declares its classes in the modules that its entry points
of ``blockwright.blocks`` name (registry/index.py).
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from blockwright.registry.index import index

T = TypeVar("T", bound=type)
_declared: dict[str, type] = {}


def readable(cls: T) -> T:
    """Declare that the decorated class may be built from the plain values of an untrusted file.

    Its constructor, whatever it is given, reads no file, runs nothing and imports nothing that a value names.
    """
    _declared[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def find_readable(target: Any, contract: type) -> type | None:
    """The declared class of a dotted path; None for any other. Only a module whose source declares it is imported.

    Args:
        target: from the file
        contract: the base class that it has to derive from
    """
    dotted = str(target)
    if dotted not in _declared and dotted in index().readable:
        importlib.import_module(index().readable[dotted])
    declared = _declared.get(dotted)
    return declared if declared is not None and issubclass(declared, contract) else None
