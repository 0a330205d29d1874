"""``calibration.json`` in the folder of logs: what was run on which machine with which code, and what it showed."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import blockwright
from blockwright.lab.calibration.control import Control, Outcome, Summary, judge
from blockwright.registry import ConfigError
from blockwright.registry.folder import parse_json, read_json, write_json
from blockwright.registry.reading import read as read_settings

FILE = "calibration.json"
PACKAGES = ("torch", "lightning", "numpy", "scipy")  # a loss depends on them
NO_CODE = ("tests", "__pycache__", "docs")


@dataclass(frozen=True)
class Instrument:
    """What a calibration is of: another machine, version or line of code is another instrument.

    Args:
        machine: its name, processor and cores
        versions: package → version
        code: digest of this package's source
    """

    machine: str
    versions: dict[str, str]
    code: str


@dataclass(frozen=True)
class Record:
    """A calibration, perhaps unfinished.

    Args:
        instrument: what was calibrated
        date: of the last run
        missing: controls that are not done
        outcomes: of the others, by name
        runs: overrides of a run, a list in JSON → its loss; null if it diverged
    """

    instrument: Instrument
    date: str = ""
    missing: tuple[str, ...] = ()
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    runs: dict[str, float | None] = field(default_factory=dict)

    @property
    def summary(self) -> Summary:
        return Summary(list(self.outcomes.values()))

    def write(self, log_dir: Path) -> None:
        """Write it, replacing an older one.

        Raises:
            ConfigError: the folder cannot be written
        """
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            write_json(log_dir / FILE, asdict(self))
        except OSError as error:
            rule = f"cannot be written ({error.strerror or error})"
            raise ConfigError(
                "paths.log_dir", str(log_dir), rule, "Write paths.log_dir=FOLDER, one with room"
            ) from None

    def losses(self) -> dict[tuple[str, ...], float]:
        """Overrides of a run → its loss, infinite if it diverged."""
        return {tuple(parse_json(run, FILE)): math.inf if loss is None else loss for run, loss in self.runs.items()}


def read(log_dir: Path) -> Record | None:
    """The record in a folder of logs; None if there is none, or it is damaged.

    Args:
        log_dir: ``paths.log_dir``
    """
    try:
        record = read_settings(Record, read_json(log_dir, FILE))
        record.losses()
    except (ValueError, TypeError):  # a ConfigError, or a key that is no list
        return None
    return record


def updated(losses: Mapping[tuple[str, ...], float], controls: Sequence[Control]) -> Record:
    """The record of these losses, on this machine and now.

    Args:
        losses: overrides of a run → its loss
        controls: all that are known
    """
    judged = {control.name: judge(control, losses) for control in controls}
    return Record(
        instrument(),
        f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        tuple(name for name, outcome in judged.items() if outcome is None),
        {name: outcome for name, outcome in judged.items() if outcome is not None},
        {json.dumps(run): loss if math.isfinite(loss) else None for run, loss in losses.items()},
    )


def line(log_dir: Path) -> str | None:
    """The sentence of a report on the instrument that it comes from; None if this machine was not calibrated.

    Args:
        log_dir: ``paths.log_dir``
    """
    record = read(log_dir)
    if record is None or record.missing or record.instrument.machine != instrument().machine:
        return None
    sentence = record.summary.sentence
    if record.instrument == instrument():
        return sentence
    return f"{sentence} That was on {record.date}, before the code or a package changed."


def line_above(folder: Path) -> str | None:
    """``line`` of the nearest folder above that has a record: a sweep's folder is within that of the logs."""
    return next((line(above) for above in folder.resolve().parents if (above / FILE).is_file()), None)


@cache
def instrument() -> Instrument:
    """This machine, with the packages and the code that would run now."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine = f"{platform.node()}, {platform.machine()}, {cores} cores"
    return Instrument(machine, {"python": platform.python_version(), **versions}, _code())


def _code() -> str:
    """Digest of the source and the configurations of this package."""
    digest = hashlib.sha256()
    root = Path(blockwright.__file__).parent
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(set(inner) - set(NO_CODE))
        for name in sorted(files):
            if name.endswith((".py", ".yaml")):
                digest.update(f"{Path(folder, name).relative_to(root)}\n".encode())
                digest.update(Path(folder, name).read_bytes())
    return digest.hexdigest()
