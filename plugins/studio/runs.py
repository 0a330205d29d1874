"""The runs and sweeps of a log folder, newest first, and what the page shows of each.

A folder is read once, and again where it has changed. It may be untrusted: every file is read as data, within limits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.drawing.figures import parameters
from blockwright.lab.report.reading import curves_of
from blockwright.lab.report.single import Points, figures, losses
from blockwright.lab.sweep.plan import overrides_of
from blockwright.registry import ConfigError
from blockwright.registry.folder import read_bytes, read_json
from blockwright.training.claims import is_taken
from blockwright.training.result import RESULTS, UNFINISHED, UNREADABLE, Result

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


# --- read the files of runs for one answer ----------------------------------------------------------------------------


SECONDS = 3.0  # after which no further file is read
LEFT_OUT = Result(UNREADABLE, reason="The page leaves it out: it is too long, or the others took too long")


class Reader:
    """Reads for one answer. Folders may be untrusted, and many: what is left out counts as missing."""

    def __init__(self) -> None:
        self._end = time.monotonic() + SECONDS

    def result(self, run: Path) -> Result:
        """How a run ended, and its figures."""
        return Result.read(run) if self._reads(run / RESULTS, 1_000_000) else LEFT_OUT

    def curves(self, run: Path) -> dict[str, Any]:
        """The curves of a run; empty where it has none."""
        return curves_of(run) if self._reads(run / "curves.json", 4_000_000) else {}

    def overrides(self, run: Path) -> list[str]:
        """The overrides of a run; empty where it has none."""
        return overrides_of(run) if self._reads(run / ".hydra" / "overrides.yaml", 20_000) else []

    def _reads(self, file: Path, most: int) -> bool:
        return time.monotonic() < self._end and _size(file) <= most


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # what reads it says so
        return 0


PAGE = 50  # runs of a page
JOBS = 500  # of a sweep that are shown
DRAWN = 8  # curves of a sweep: more look alike
POINTS = 500  # of a curve
LONGEST = 2000  # characters of a text of a folder
REPORT = "report"
MEDIA = {
    ".html": "text/html",
    ".svg": "image/svg+xml",
    ".md": "text/plain",
    ".json": "application/json",
    ".csv": "text/csv",
}


class Runs:
    """The runs and sweeps below a folder.

    Args:
        index: finds them
    """

    def __init__(self, index: Index) -> None:
        self.index = index

    def page(self, part: str, number: int) -> dict[str, Any]:
        """A page of the runs and sweeps whose name contains a text, the newest first."""
        places = self.index.newest(part)
        shown, reader = places[number * PAGE : (number + 1) * PAGE], Reader()
        return {"total": len(places), "page": number, "size": PAGE, "rows": [self._row(each, reader) for each in shown]}

    def one(self, found: Place) -> dict[str, Any]:
        """A run or a sweep, with its chart."""
        sweep, reader = found.name.rpartition("/")[0], Reader()
        # The names of what a report holds that a browser can show
        folder = self._folder(found) / REPORT
        reports = ["index.html"] if not folder.is_symlink() and (folder / "index.html").is_file() else []
        row = {
            **self._row(found, reader),
            "overrides": _short(reader.overrides(self._folder(found))),
            "reports": reports,
            "sweep": sweep if self.index.find(sweep) else None,
        }
        return row | (self._sweep(found, reader) if found.kind == "sweep" else self._run(found, reader))

    def report(self, found: Place, name: str) -> tuple[bytes, str] | None:
        """A file of a report and its media type; None where there is no such file, or it is none of a report's."""
        folder = self._folder(found) / REPORT
        if folder.is_symlink() or "/" in name or (media := MEDIA.get(Path(name).suffix)) is None:
            return None
        try:
            return read_bytes(folder, name, 64_000_000), media
        except (ConfigError, OSError, ValueError):
            return None

    def _folder(self, found: Place) -> Path:
        return self.index.root / found.name

    def _row(self, found: Place, reader: Reader) -> dict[str, Any]:
        if found.kind == "sweep":
            plan = _plan(self._folder(found))
            jobs = plan.get("jobs")
            state = "running" if is_taken(self._folder(found)) else ""
            return {**_named(found), "state": state, "jobs": len(jobs) if isinstance(jobs, list) else None}
        result = reader.result(self._folder(found))
        loss = {name: result.metrics[name] for name in ("val/loss", "test/loss") if name in result.metrics}
        return {**_named(found), "state": _state(self._folder(found), result), "figures": _finite(loss)}

    def _run(self, found: Place, reader: Reader) -> dict[str, Any]:
        folder = self._folder(found)
        result, curves = reader.result(folder), reader.curves(folder)
        known = [
            {"name": name, "value": value, "unit": f.unit if (f := result.figures.get(name)) else ""}
            for name, value in sorted(_finite(result.metrics).items())
        ]
        size = [f"{parameters(result.parameters)} parameters"] if result.parameters else []
        size += [f"{result.steps:,.0f} steps"] if result.steps else []
        chart = losses(_points(curves, "train"), _points(curves, "val"))
        return {
            "results": known,
            "size": ", ".join(size),
            "reason": result.reason[:LONGEST],
            "chart": chart.inline() if curves.get("train") or curves.get("val") else None,
        }

    def _sweep(self, found: Place, reader: Reader) -> dict[str, Any]:
        """The jobs of a sweep, and the validation curves of those that are best so far."""
        jobs = self._jobs(found)
        rows = {number: self._row(job, reader) for number, job in jobs.items()}
        overrides = {number: reader.overrides(self._folder(job)) for number, job in jobs.items()}
        curves = {number: _points(reader.curves(self._folder(job)), "val") for number, job in jobs.items()}
        lines = {number: line for number, line in curves.items() if line}
        best = sorted(sorted(lines, key=lambda number: lines[number][-1][1])[:DRAWN])
        common = set.intersection(*map(set, overrides.values())) if len(overrides) > 1 else set()
        names = {number: " ".join([str(number), *(o for o in overrides[number] if o not in common)]) for number in best}
        chart = figures("validation loss", {names[number]: lines[number] for number in best}).inline() if best else None
        return {"rows": [{**row, "overrides": _short(overrides[n])} for n, row in rows.items()], "chart": chart}

    def _jobs(self, sweep: Place) -> dict[int, Place]:
        """The jobs of a sweep that are shown, by number; none of another folder, to which a link leads."""
        names = (p.name for p in self._folder(sweep).iterdir() if p.name.isdecimal() and len(p.name) < 9)
        found = ((number, self.index.find(f"{sweep.name}/{number}")) for number in sorted(set(map(int, names)))[:JOBS])
        return {number: job for number, job in found if job}


def _named(found: Place) -> dict[str, Any]:
    return {"name": found.name, "kind": found.kind, "changed": found.changed / 1e9}


def _state(folder: Path, result: Result) -> str:
    return "running" if result.status == UNFINISHED and is_taken(folder) else result.status[:40]


def _plan(folder: Path) -> Mapping[str, Any]:
    """The plan of a sweep; empty where it has none, or one that is damaged."""
    try:
        plan = read_json(folder, "plan.json")
    except ConfigError:
        return {}
    return plan if isinstance(plan, dict) else {}


def _points(curves: Mapping[str, Any], name: str) -> Points:
    """The finite points of a curve: as many as can be seen, and the last."""
    points = [(step, value) for step, value in curves.get(name, ()) if _is_finite(step) and _is_finite(value)]
    return [*points[:-1][:: 1 + len(points) // POINTS], *points[-1:]]


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON has."""
    return {name[:200]: value for name, value in values.items() if _is_finite(value)}


def _is_finite(value: float) -> bool:
    return abs(value) < 1e300


def _short(items: list[str]) -> str:
    return " ".join(items)[:LONGEST]
