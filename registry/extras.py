"""Refuse settings that need packages of extras which are not installed, naming the extra."""

from __future__ import annotations

import importlib.util
from typing import Any

from blockwright.registry.errors import ConfigError


def has_package(name: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


def require(extra: str, *packages: str, path: str, value: Any = None, otherwise: str = "") -> None:
    """Refuse a setting that needs packages which are not installed.

    Args:
        extra: that installs them
        packages: names to import
        path, value: of the setting
        otherwise: alternative for the user: ``or train on your own files: data=text``

    Raises:
        ConfigError: one of the packages is missing
    """
    missing = [name for name in packages if not has_package(name)]
    if missing:
        rule = f"needs a package that is not installed ({', '.join(missing)})"
        raise ConfigError(path, value, rule, f"pip install 'blockwright[{extra}]'{otherwise and f', {otherwise}'}")
