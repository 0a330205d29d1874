"""Check for slowdowns: the ratios of a new run against the recorded ones.

``python -m benchmarks.check NEW.json …``: each file is compared with the record of the same name and the same machine
under ``benchmarks/results``. Ratios only, never seconds: they are stable from day to day and beside other work, but not
from machine to machine, so where this one has no record, that is said. Tables that were not run are ignored; a missing
ratio of a table that was run is an error. Exit code 1: a ratio is 10 % worse, or missing; 2: nothing to compare.
Without a file it lists the machines that there are records of, and which promises hold there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import MACHINES, RESULTS, number, records

TOLERANCE = 0.10
NOTHING = 1e-4  # differences of outputs or bytes below this count as zero


def worse(recorded: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """Relative amount by which a ratio is worse than recorded; negative if better."""
    before, now = recorded["spread"]["median"], new["spread"]["median"]
    if max(before, now) < NOTHING:
        return 0.0
    if min(before, now) <= 0:
        return 1.0 if (now > before) == (recorded["better"] == "less") else -1.0
    return before / now - 1 if recorded["better"] == "more" else now / before - 1


def compare(recorded: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> tuple[list[str], list[str]]:
    """Lines to print, and the names of the ratios that are worse.

    Args:
        recorded, new: documents of one benchmark
        tolerance: allowed relative worsening
    """
    before = {ratio["name"]: ratio for ratio in recorded["ratios"] if ratio["checked"]}
    lines, failures = [], []
    for ratio in new["ratios"]:
        if ratio["name"] not in before:
            continue
        by = worse(before[ratio["name"]], ratio)
        medians = [number(r["spread"]["median"]) for r in (before[ratio["name"]], ratio)]
        failed = by > tolerance
        verdict = f"{by:.0%} worse" if failed else "ok"
        lines.append(f"{verdict:>10}  {medians[0]:>8} → {medians[1]:<8}  {ratio['name']}")
        failures += [ratio["name"]] if failed else []
    tables, found = ({table(ratio["name"]) for ratio in new["ratios"]}, {ratio["name"] for ratio in new["ratios"]})
    for name in before:
        if name not in found and table(name) in tables:
            lines.append(f"{'missing':>10}  {name}")
            failures.append(name)
    return lines, failures


def table(name: str) -> str:
    """The part of a ratio's name before the measured quantity."""
    return name.rpartition(": ")[0]


def machines(folder: Path) -> list[str]:
    """A table in Markdown of all records: benchmark, machine, date, promises that hold there."""
    lines = ["| benchmark | machine | date | promises that hold |", "|---|---|---|---|"]
    for name in sorted({file.stem for file in [*folder.glob("*.json"), *folder.glob(f"{MACHINES}/*/*.json")]}):
        for document in records(folder, name).values():
            if "about" not in document:  # what was compiled for GPUs that are not here, on no machine of its own
                continue
            held = [ratio["holds"] for ratio in document.get("ratios", ()) if ratio["holds"] is not None]
            about = document["about"]
            held_of = f"{sum(held)} of {len(held)}" if held else ""
            lines.append(f"| {name} | {about['device']} | {about['date'].split()[0]} | {held_of} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit code: 0, 1 for worse, 2 if not comparable."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("new", nargs="*", type=Path, metavar="NEW.json", help="results of a run with --out elsewhere")
    parser.add_argument("--recorded", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default: %(default)s")
    given = parser.parse_args(arguments)
    if not given.new:
        print("\n".join(machines(given.recorded)))
        return 0
    failures: list[str] = []
    for file in given.new:
        try:
            new, known = json.loads(file.read_text()), records(given.recorded, file.stem).values()
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        own = new["about"]["device"]
        recorded = next((document for document in known if document["about"]["device"] == own), None)
        if recorded is None:
            others = " and ".join(repr(document["about"]["device"]) for document in known) or "no machine"
            remedy = "record it here, without --out, or check there"
            print(f"error: {file.stem} has no record of {own!r}, but of {others}: {remedy}", file=sys.stderr)
            return 2
        lines, worse_ones = compare(recorded, new, given.tolerance)
        if not lines:
            print(f"error: {file} has no recorded ratio: run the same shapes", file=sys.stderr)
            return 2
        print("\n".join(lines))
        failures += worse_ones
    if failures:
        print(
            f"{len(failures)} ratios are missing or more than {given.tolerance:.0%} worse than recorded",
            file=sys.stderr,
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
