"""Exchanges by name. Imports nothing heavy: names are refused before a process starts."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from blockwright.registry import ConfigError, did_you_mean

if TYPE_CHECKING:
    from blockwright.training.parallel.exchange.all_to_all import Exchange

CLASSES = {"all_to_all": "AllToAll", "deep_ep": "DeepEP"}  # in the module of the same name
NEEDS = {"deep_ep": "deep_ep"}  # packages, none of them on the package index
PATH = "trainer.strategy.exchange"


def check_exchange(name: Any) -> None:
    """Refuse a name that no exchange has, or one whose package is not installed.

    Raises:
        ConfigError
    """
    if name not in CLASSES:
        raise ConfigError(PATH, name, "there is no such exchange", did_you_mean(str(name), CLASSES))
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        remedy = "Build it from github.com/deepseek-ai/DeepEP, or write all_to_all"
        raise ConfigError(PATH, name, f"the package {package} is not installed", remedy)


def exchange_of(name: str) -> type[Exchange]:
    """The class.

    Raises:
        ConfigError: as ``check_exchange``
    """
    check_exchange(name)
    found: type[Exchange] = getattr(
        importlib.import_module(f"blockwright.training.parallel.exchange.{name}"), CLASSES[name]
    )
    return found
