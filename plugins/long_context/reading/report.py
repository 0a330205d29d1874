"""Heat maps of how far each arm reads, from the reading tests of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from blockwright.lab.report.charts import Drawing, of_each
from blockwright.lab.report.findings import Finding
from blockwright.lab.report.svg import Figure
from blockwright.lab.report.sweep import Run
from blockwright.lab.report.words import seeds
from blockwright.plugins.long_context.reading.reading import FILE, Reading, heat_map
from blockwright.registry.folder import read_json


def reach(index: int, finding: Finding) -> list[Figure]:
    """A heat map for each reading test that all runs of an arm have made, mean over seeds."""
    found = [readings for run in finding.runs if run.seed in finding.values and (readings := _readings(run))]
    tests = [test for test in found[0] if all(test in readings for readings in found)] if found else []
    figures = []
    for test in tests:
        mean = _mean([readings[test] for readings in found])
        if mean is not None:
            heading = f"{finding.name}: {test}"
            caption = (
                f"Right tokens of the answers by length and depth, mean of {seeds(len(found))}; below: over depths."
            )
            figures.append(Figure(heat_map(mean, f"reading-{index}-{test}", heading), heading, caption))
    return figures


def _readings(run: Run) -> dict[str, Reading]:
    """The reading tests of a run; empty if it has made none, or its file is damaged."""
    try:
        assert run.folder is not None
        tests = read_json(run.folder, FILE)["tests"]
        return {test["test"]: _checked(test) for test in tests}
    except (AssertionError, OSError, ValueError, KeyError, TypeError):
        return {}


def _checked(test: dict[str, Any]) -> Reading:
    rows = [[float(value) for value in row] for row in test["teacher_forced"]]
    lengths, depths = [int(n) for n in test["lengths"]], [float(d) for d in test["depths"]]
    if len(rows) != len(lengths) or any(len(row) != max(1, len(depths)) for row in rows):
        raise ValueError("the grid has not its lengths and depths")
    return Reading(str(test["test"]), lengths, depths, rows)


def _mean(found: Sequence[Reading]) -> Reading | None:
    """The mean of grids of the same cells; None if they differ."""
    first = found[0]
    if any((other.lengths, other.depths) != (first.lengths, first.depths) for other in found):
        return None
    rows = [
        [math.fsum(cells) / len(cells) for cells in zip(*(other.teacher_forced[i] for other in found), strict=True)]
        for i in range(len(first.lengths))
    ]
    return Reading(first.test, first.lengths, first.depths, rows)


REACH = Drawing("How far they read", of_each(reach))
