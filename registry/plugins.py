"""Files and folders that installed packages offer through a group of entry points."""

from __future__ import annotations

import importlib.util
import warnings
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from blockwright.registry.errors import ConfigError

CONF = "blockwright.conf"  # group of folders of Hydra configurations
ADAPTERS = "blockwright.adapters"  # group of readers of low-rank adapters, by the format of their files


def folders(group: str) -> dict[Path, str]:
    """Folder → the distribution that offers it.

    Args:
        group: of entry points that name packages; one that cannot be found only causes a warning
    """
    offered = {}
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        folder = source(point.value)
        if folder is None or not folder.is_dir():
            reason = "there is no such package" if folder is None else "it is not a package"
            what = group.rpartition(".")[2]
            warnings.warn(f"{what} {point.value!r} of {owner(point)} cannot be found: {reason}", stacklevel=2)
        else:
            offered[folder.resolve()] = owner(point)
    return offered


def offered(group: str, name: str, path: str) -> Any:
    """The object that an installed package offers under a name.

    Args:
        group: of entry points
        name: of one of them
        path: of the setting that needs it, for the error message

    Raises:
        ConfigError: no package offers it
    """
    for point in entry_points(group=group, name=name):
        return point.load()
    rule = f"needs a package that offers {name!r} in the entry points {group}, and none is installed"
    raise ConfigError(path, name, rule, "Install a package that offers it")


def owner(point: EntryPoint) -> str:
    """The distribution that offers an entry point."""
    return point.dist.name if point.dist else point.value


def source(name: str) -> Path | None:
    """The folder of a package or the file of a module; None if there is none. Nothing is imported.

    Args:
        name: with dots
    """
    first, *others = name.split(".")
    spec = importlib.util.find_spec(first)
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and not others else None
    paths = [Path(place, *others) for place in spec.submodule_search_locations]
    found = (each for path in paths for each in (path, path.with_name(f"{path.name}.py")) if each.exists())
    return next(found, None)
