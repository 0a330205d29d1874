"""Lightning imported without what a run of ours does not use of torchmetrics."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = "torchmetrics"
OFTEN = {"Metric": "metric", "MetricCollection": "collections"}


class _WhenAsked(Loader):
    """Loads the package's own ``__init__`` when a name of it is asked for that the usual submodules do not have.

    It would import every metric there is, and with them scipy, transformers and pandas where they are installed: a
    third of the time to the first step. Submodules are imported as ever.
    """

    def __init__(self, whole: Loader) -> None:
        self.whole = whole

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = importlib.import_module(f"{PACKAGE}.__about__").__version__  # type: ignore[attr-defined]

        module._logger = logging.getLogger(PACKAGE)  # type: ignore[attr-defined]

        def find(name: str) -> Any:
            if name in OFTEN:
                importlib.import_module(f"{PACKAGE}.utilities")  # first: it and the metrics import each other
                return getattr(importlib.import_module(f"{PACKAGE}.{OFTEN[name]}"), name)
            if name.startswith("__"):
                raise AttributeError(name)
            del module.__getattr__
            self.whole.exec_module(module)
            return getattr(module, name)

        module.__getattr__ = find  # type: ignore[method-assign]


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == PACKAGE else None
        if spec is not None and spec.loader is not None:
            spec.loader = _WhenAsked(spec.loader)
        return spec


def import_torchmetrics_as_needed() -> None:
    """From now on; what is imported already stays."""
    if PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
