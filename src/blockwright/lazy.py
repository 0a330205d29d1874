"""Lazy imports of the public names: ``import blockwright`` itself loads neither torch nor Lightning.

The table of names is the stub ``__init__.pyi``, also read by type checkers.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def read_stub(file: Path) -> dict[str, tuple[str, str]]:
    """Public name → the module that defines it, and its name there.

    Args:
        file: a ``.pyi`` of ``from MODULE import NAME as PUBLIC`` lines
    """
    imports = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported on first use (PEP 562).

    Args:
        package: its ``__name__``
        file: its ``__file__``; the stub is beside it
    """
    names = read_stub(Path(file).with_suffix(".pyi"))
    public = ["__version__", *sorted(names)]

    def load(name: str) -> Any:
        if name == "__version__":
            return version(package)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = names[name]
        value = getattr(importlib.import_module(module), original)
        setattr(sys.modules[package], name, value)  # cached for the next access
        return value

    return load, lambda: public, public
