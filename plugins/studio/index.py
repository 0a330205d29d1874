"""The runs and sweeps of a log folder, newest first. Each folder is read once, and again where it has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OF_A_SWEEP = frozenset({"plan.json", "multirun.yaml"})
OF_A_RUN = frozenset({".hydra", "results.json", "curves.json", "lightning_cli.yaml"})
DEEPEST = 5  # folders between the log folder and a run
MOST = 100_000  # folders that are read
FRESH = 1.0  # seconds for which the index is not looked at again


@dataclass(frozen=True)
class Folder:
    """A folder as last read.

    Args:
        changed: when its entries last changed, in nanoseconds
        kind: ``run``, ``sweep``, or empty for a folder of folders
        inner: names of the folders in it, of a folder of folders
    """

    changed: int
    kind: str
    inner: tuple[str, ...] = ()


@dataclass(frozen=True, order=True)
class Place:
    """A run or a sweep; in order of time.

    Args:
        changed: as of its folder
        name: path below the log folder
        kind: ``run`` or ``sweep``
    """

    changed: int
    name: str
    kind: str


class Index:
    """The runs and sweeps below a folder. No link is followed: whatever it names is below the folder.

    Args:
        root: the log folder, which may not exist yet
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, Folder] = {}
        self._places: dict[str, Place] = {}
        self._newest: list[Place] = []
        self._looked = -FRESH

    def newest(self, part: str = "") -> list[Place]:
        """All whose name contains a text, the newest first."""
        self._look()
        return [place for place in self._newest if part.lower() in place.name.lower()]

    def find(self, name: str) -> Place | None:
        """The run or the sweep of a name, or the job of a sweep; None where there is none."""
        self._look()
        sweep, _, job = name.rpartition("/")
        if (place := self._places.get(name)) or not job.isdecimal() or sweep not in self._places:
            return place
        folder = self.root / name
        real = folder.is_dir() and not folder.is_symlink()
        return Place(0, name, "run") if real and self._places[sweep].kind == "sweep" else None

    def _look(self) -> None:
        """Read the folders that have changed."""
        if time.monotonic() - self._looked < FRESH:
            return
        known: dict[str, Folder] = {}
        places = []
        for name, folder in self._walk():
            known[name] = folder
            if folder.kind:
                places.append(Place(folder.changed, name, folder.kind))
            if len(known) == MOST:
                break
        self._known = known
        self._newest = sorted(places, reverse=True)
        self._places = {place.name: place for place in places}
        self._looked = time.monotonic()

    def _walk(self) -> Iterator[tuple[str, Folder]]:
        waiting = [("", 0)]
        while waiting:
            name, depth = waiting.pop()
            folder = self._folder(name)
            if folder is None:
                continue
            yield name, folder
            if depth < DEEPEST:
                waiting += [(f"{name}/{inner}" if name else inner, depth + 1) for inner in folder.inner]

    def _folder(self, name: str) -> Folder | None:
        try:
            changed = os.stat(self.root / name, follow_symlinks=name == "").st_mtime_ns
            before = self._known.get(name)
            return before if before and before.changed == changed else _read(self.root / name, changed)
        except (OSError, ValueError):  # it has gone meanwhile, or must not be read
            return None


def _read(folder: Path, changed: int) -> Folder:
    names, inner = set(), []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.add(entry.name)
            if entry.is_dir(follow_symlinks=False) and entry.name.isprintable():
                inner.append(entry.name)
    kind = "sweep" if names & OF_A_SWEEP else "run" if names & OF_A_RUN else ""
    return Folder(changed, kind, () if kind else tuple(inner))
