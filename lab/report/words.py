"""Findings as sentences and formatted numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockwright.training.result import UNFINISHED

if TYPE_CHECKING:  # a run's own report has words, and no statistics
    from blockwright.lab.report.findings import Finding, Findings
    from blockwright.lab.report.sweep import Sweep
    from blockwright.lab.statistics.intervals import Interval

ARROWS = {"less": "↓", "more": "↑", None: ""}
MINUS = "−"
HUGE = 1e12  # above, digits are not shown


def headed(name: str, sweep: Sweep) -> str:
    """The name of a figure over its column, with an arrow that says which way is better."""
    figure = sweep.figures.get(name)
    better = figure.better if figure is not None else None
    better = ("more" if sweep.maximize else "less") if name == sweep.metric else better
    return f"{name} {ARROWS[better]}".rstrip()


def in_unit(unit: str) -> str:
    """The unit of a figure in a sentence: in nats, as a share of answers."""
    return f"as a share {unit}" if unit.startswith("of ") else f"in {unit}"


def legend(names: Sequence[str], sweep: Sweep) -> str:
    """What the arrows over columns mean, and the units of the figures under them."""
    units = [f"{name} {in_unit(unit)}" for name in dict.fromkeys(names) if (unit := sweep.unit_of(name))]
    return f"↓: less is better, ↑: more is better{''.join(f'; {each}' for each in units)}."


def plain(value: float | None, decimals: int = 4) -> str:
    """A number with a proper minus sign; a dash for none."""
    return "–" if value is None else _written(value, decimals)


def signed(value: float, decimals: int) -> str:
    return _written(value, decimals, "+")


def _written(value: float, decimals: int, sign: str = "") -> str:
    if abs(value) < 0.5 * 10**-decimals:  # rounded to nothing, it has no sign
        return f"{0:.{decimals}f}"
    how = f"{sign}.3g" if abs(value) >= HUGE else f"{sign},.{decimals}f"
    return format(value, how).replace("-", MINUS)


def decimals(half: float | None) -> int:
    """Decimals that show two digits of an uncertainty."""
    if not half or not math.isfinite(half):
        return 4
    return min(max(1 - math.floor(math.log10(half)), 0), 6)


def around(found: Interval | None, sign: bool = False) -> str:
    """Mean ± half the interval."""
    if found is None:
        return "–"
    places = decimals(found.half)
    mean = signed(found.mean, places) if sign else plain(found.mean, places)
    return mean if found.half is None else f"{mean} ± {plain(found.half, places)}"


def probability(p: float | None) -> str:
    if p is None:
        return "–"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def bare(p: float | None) -> str:
    """A probability without its letter."""
    return probability(p).removeprefix("p = ").removeprefix("p ")


def ratio(found: Interval | None) -> str:
    """A speed-up with its interval."""
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.mean:.2f}×"
    return f"{found.mean:.2f}× ({found.low:.2f} to {found.high:.2f})"


def short(value: float | None) -> str:
    """A count in three digits: 1.23M."""
    if value is None:
        return "–"
    if abs(value) < 999.5:
        return f"{value:.4g}".replace("-", MINUS)
    for size, suffix in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if abs(value) < 999.5 * size:  # above, it rounds to 1000 of them
            return f"{value / size:.3g}{suffix}".replace("-", MINUS)
    many = value / 1e12
    return f"{f'{many:.3g}' if abs(many) < 999.5 else f'{many:,.0f}'}T".replace("-", MINUS)


def percent(share: float | None) -> str:
    """A difference in percent; of less than 0.005 % without a sign, of none at all without decimals."""
    return "–" if share is None else f"{signed(100 * share, 2)} %" if share else "0 %"


def seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def measured(finding: Finding, findings: Findings) -> str:
    """The figure of an arm over its seeds, in one sentence: of the baseline, or the only arm."""
    figure = f"{findings.sweep.metric} {around(finding.interval)} {findings.sweep.unit}".rstrip()
    role = " is the baseline" if findings.others else ""
    return f"{finding.name}{role}: {figure} ({seeds(len(finding.values))})."


def state(findings: Findings) -> str:
    """The note at the top of the report of an incomplete sweep; else empty."""
    total, lost, waiting = len(findings.sweep.runs), findings.lost, len(findings.unfinished)
    gone = Counter(
        "diverged" if r.result.status == "completed" else r.result.status for r in lost if r.result.status != UNFINISHED
    )
    parts = []
    if findings.baseline.interval is None and findings.sweep.kind != "search":
        parts.append(f"The baseline {findings.baseline.name} has no figure, so nothing is compared: see --baseline.")
    if waiting:
        parts.append(
            f"Not finished: {waiting} of {total} runs have no result yet. Every figure below may still change."
        )
    if gone:
        listed = ", ".join(f"{count} {status}" for status, count in gone.items())
        parts.append(
            f"{sum(gone.values())} of {total} runs are lost ({listed}). Comparisons are over the seeds that both arms "
            "have."
        )
    return " ".join(parts)
