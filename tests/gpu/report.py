"""The report: a table for each section, as Markdown and JSON, written again after each case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Result, Table
from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json
from tests.gpu.answer import FAIL, NOT_APPLICABLE, NOT_REACHED
from tests.gpu.run import Row


def write(rows: Sequence[Row], about: dict[str, Any], folder: Path) -> Path:
    """Write ``gpu.json`` and ``gpu.md``; returns the path of the first."""
    result = Result("gpu", about, tables=[_summary(rows)])
    for section in dict.fromkeys(row.section for row in rows):
        result.tables.append(_table(section, [row for row in rows if row.section == section]))
    result.raw = {"rows": [row._asdict() for row in rows]}
    return result.save(folder)


def before(folder: Path, about: dict[str, Any], small: bool) -> list[Row]:
    """The answers of an earlier run of this command into this folder, without what it did not reach.

    Raises:
        ConfigError: they are of another device, commit or version
    """
    path = folder / "gpu.json"
    if not path.exists():
        return []
    found = read_json(folder, path.name)
    here = {**about, "small": small}
    for key in ("device", "commit", "versions", "small"):
        if found["about"].get(key) != here[key]:
            rule = f"holds a report of another {key} ({found['about'].get(key)}; here {here[key]})"
            raise ConfigError("--out", str(folder), rule, "Name another folder, or delete this one")
    rows = [Row(**row) for row in found["raw"]["rows"]]
    return [row for row in rows if row.result != NOT_REACHED and row.case != "start"]


def has_failed(rows: Sequence[Row]) -> bool:
    return any(row.result == FAIL for row in rows)


def _summary(rows: Sequence[Row]) -> Table:
    counts = {section: Counter(r.result for r in rows if r.section == section) for section, *_ in rows}
    kinds = list(dict.fromkeys(row.result for row in rows))
    return Table("Summary", ["section", *kinds], [[s, *(c[k] for k in kinds)] for s, c in counts.items()])


def _table(section: str, rows: Sequence[Row]) -> Table:
    """What does not apply is counted, and not listed."""
    shown = [row for row in rows if row.result != NOT_APPLICABLE]
    names = list(dict.fromkeys(name for row in shown for name in row.figures))
    cells = [[r.case, r.result, *(r.figures.get(n) for n in names), r.seconds, r.detail] for r in shown]
    reasons = Counter(row.detail for row in rows if row.result == NOT_APPLICABLE)
    note = "; ".join(f"{n} not applicable: {reason}" for reason, n in reasons.items())
    return Table(section, ["case", "result", *names, "seconds", "detail"], cells, note=note)
