"""What each arm says about pictures, from the answers of its runs."""

from __future__ import annotations

from blockwright.lab.report.charts import Drawing, of_each
from blockwright.lab.report.findings import Finding
from blockwright.lab.report.svg import Figure
from blockwright.lab.report.sweep import Run
from blockwright.plugins.vision.asking.found import FILE, Found, sights


def sight(index: int, finding: Finding) -> list[Figure]:
    """Accuracy by kind of question and sampled pictures of the first run of an arm that has asked."""
    for run in finding.runs:
        if run.seed in finding.values and (found := _found(run)):
            chart = sights(found, f"pictures-{index}", f"{finding.name}: answers about pictures")
            caption = f"Seed {run.seed}; ± is a 95 % interval over answers. Samples: the answer, ≠ the truth."
            return [Figure(chart, finding.name, caption)]
    return []


def _found(run: Run) -> Found | None:
    """What a run has found; None if it has not asked, or its file is damaged."""
    try:
        return None if run.folder is None else Found.read(run.folder / FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return None


SIGHT = Drawing("What they see in pictures", of_each(sight))
