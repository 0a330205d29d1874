"""``results.json``: how a run ended, and its figures. It is read and written here only."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json
from blockwright.training.figure import Figure, read_records
from blockwright.training.writing import write_json

RESULTS = "results.json"  # in the folder of a run
UNFINISHED = "unfinished"
UNREADABLE = "unreadable"
LOST = ("failed", "diverged")
SECONDS = ("save_seconds", "fit_seconds", "wall_seconds")
NUMBERS = ("parameters", "active_parameters", "steps", *SECONDS, "code", "retried_as")


@dataclass(frozen=True)
class Result:
    """How a run ended, and its figures.

    Args:
        status: ``completed``, ``failed``, ``diverged`` or ``pruned``; ``unfinished`` or ``unreadable`` without a result
        parameters, active_parameters: of the model
        steps: of the optimizer
        save_seconds: of the slowest checkpoint
        fit_seconds: of training
        wall_seconds: of the process, its start included, as the sweep measured its last attempt
        metrics: logged name → final value, NaN and infinity included
        figures: logged name → its unit and direction
        code: exit code of a pod
        reason: why it ended early; else empty
        retried_as: number of the job that a search ran in its place
    """

    status: str
    parameters: float | None = None
    active_parameters: float | None = None
    steps: float | None = None
    save_seconds: float | None = None
    fit_seconds: float | None = None
    wall_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    code: float | None = None
    reason: str = ""
    retried_as: float | None = None

    @property
    def ended(self) -> bool:
        """True for a run that has written its result."""
        return self.status not in (UNFINISHED, UNREADABLE)

    @property
    def lost(self) -> bool:
        """True for a run that failed or diverged."""
        return self.status in LOST

    def value(self, metric: str) -> float | None:
        """The finite final value of a metric; None without one, or if the run did not complete."""
        value = self.metrics.get(metric) if self.status == "completed" else None
        return float(value) if value is not None and math.isfinite(value) else None

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Read the result in the folder of a run, which may be damaged or untrusted.

        The status is ``unfinished`` without a file, and ``unreadable`` for half a file.
        """
        if not (folder / RESULTS).exists():
            return cls(UNFINISHED, reason=f"no {RESULTS}: it is still running, or was stopped")
        try:
            return cls.of(read_json(folder, RESULTS))
        except ConfigError:
            return cls.of(None)

    @classmethod
    def of(cls, plain: Any) -> Result:
        """A result from plain types, of which unexpected values are left out."""
        if not isinstance(plain, Mapping) or not isinstance(plain.get("status"), str):
            return cls(UNREADABLE, reason=f"its {RESULTS} cannot be read")
        metrics, reason = plain.get("metrics"), plain.get("reason")
        return cls(
            plain["status"],
            metrics=_numbers(metrics) if isinstance(metrics, Mapping) else {},
            figures=read_records(plain),
            reason=reason if isinstance(reason, str) else "",
            **_numbers({name: plain.get(name) for name in NUMBERS}),
        )

    def to_plain(self) -> dict[str, Any]:
        """The contents of the file: every value that is known."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["figures"] = {name: figure.to_plain() for name, figure in self.figures.items()}
        wanted = ("metrics",) if self.status == "completed" else ()
        return {name: value for name, value in plain.items() if name in wanted or value not in (None, "", {})}

    def write(self, folder: Path) -> None:
        """Write it to the folder of a run, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS, self.to_plain())


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among values: NaN and infinity are, an integer that no float can hold is not."""
    return {name: value for name, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) or (whole and abs(value) <= sys.float_info.max)


def record_failure(
    folder: Path, reason: str, status: str = "failed", metrics: Mapping[str, float] | None = None
) -> None:
    """Write the result of a run that ended early, beside the figures that it had.

    Args:
        folder: of the run
        reason: human-readable
        status: ``failed``, ``diverged`` or ``pruned``
        metrics: figures to add
    """
    result = Result.read(folder)
    replace(result, status=status, reason=reason, metrics={**result.metrics, **(metrics or {})}).write(folder)
