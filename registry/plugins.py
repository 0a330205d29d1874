"""Folders of files that installed packages offer through a group of entry points."""

from __future__ import annotations

import importlib.util
import warnings
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path


def folders(group: str) -> dict[Path, str]:
    """Folder → the distribution that offers it.

    Args:
        group: of entry points that name packages; one that cannot be found only causes a warning
    """
    return {
        folder.resolve(): point.dist.name if point.dist else point.value
        for point in sorted(entry_points(group=group), key=lambda p: p.name)
        for folder in _of_package(point)
    }


def _of_package(point: EntryPoint) -> list[Path]:
    try:
        spec = importlib.util.find_spec(point.value)
        reason = "it is not a package"
    except Exception as error:  # imports the parent package, which may fail in any way
        spec, reason = None, f"{type(error).__name__}: {error}"
    if spec is None or not spec.submodule_search_locations:
        owner = point.dist.name if point.dist else point.value
        what = point.group.rpartition(".")[2]
        warnings.warn(f"{what} {point.value!r} of {owner} cannot be found: {reason}", stacklevel=2)
        return []
    return [Path(place) for place in spec.submodule_search_locations]
