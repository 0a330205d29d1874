"""Findings as sentences and formatted numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.sweep import Sweep
from blockwright.lab.statistics.intervals import LEVEL, Comparison, Interval
from blockwright.training.result import UNFINISHED

ARROWS = {"less": "↓", "more": "↑", None: ""}
MINUS = "−"
HUGE = 1e12  # above, digits are not shown


def headed(name: str, sweep: Sweep) -> str:
    """The name of a figure over its column, with an arrow that says which way is better."""
    figure = sweep.figures.get(name)
    better = figure.better if figure is not None else None
    better = ("more" if sweep.maximize else "less") if name == sweep.metric else better
    return f"{name} {ARROWS[better]}".rstrip()


def legend(names: Sequence[str], sweep: Sweep) -> str:
    """What the arrows over columns mean, and the units of the figures under them."""
    units = [f"{name} in {unit}" for name in dict.fromkeys(names) if (unit := sweep.unit_of(name))]
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
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.4g}"


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share:+.2f} %".replace("-", MINUS) if share else "0 %"


def seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def tone(finding: Finding, findings: Findings) -> str:
    """baseline, better, worse, noise, unknown (one seed), unfinished or lost."""
    if finding.interval is None:
        return "unfinished" if any(run.result.status == UNFINISHED for run in finding.runs) else "lost"
    if finding.is_baseline:
        return "baseline"
    if finding.comparison is None or finding.comparison.p is None:
        return "unknown"
    if not finding.comparison.is_told_from_noise:
        return "noise"
    return "better" if _is_better(finding.comparison, findings) else "worse"


def _is_better(comparison: Comparison, findings: Findings) -> bool:
    return (comparison.difference.mean > 0) == findings.sweep.maximize


def verdict(finding: Finding, findings: Findings) -> str:
    """The verdict on an arm, with its lost runs, in one or two sentences."""
    sentence = _verdict(finding, findings)
    lost = finding.lost
    if finding.interval is None or not lost:
        return sentence
    states = Counter(run.result.status if run.result.status != "completed" else "diverged" for run in lost)
    listed = " and ".join(f"{count} {status}" for status, count in states.items())
    return f"{sentence} Of its {seeds(len(finding.runs))}, {listed}."


def _verdict(finding: Finding, findings: Findings) -> str:
    name, other = finding.name, finding.against
    how = tone(finding, findings)
    if how == "lost":
        return f"{name} is lost: {_loss(finding, findings)}."
    if how == "unfinished":
        return f"{name} has no result yet."
    found = around(finding.interval)
    measure = f"{findings.sweep.metric} {found} {findings.sweep.unit}".rstrip()
    if how == "baseline" and not findings.others:
        return f"{name}: {measure} ({seeds(len(finding.values))})."
    if how == "baseline":
        return f"{name} is the baseline: {measure} ({seeds(len(finding.values))})."
    if finding.comparison is None:
        return f"{name} has {measure}, and no seed in common with a finished {other} to compare."
    return _comparison(finding.comparison, name, other, how, findings)


def _comparison(comparison: Comparison, name: str, other: str, how: str, findings: Findings) -> str:
    of, difference = findings.sweep.unit, comparison.difference
    amount = f"{plain(abs(difference.mean), decimals(difference.half))}"
    if how == "unknown":
        direction = "lower" if difference.mean < 0 else "higher"
        text = f"{amount} {of}".rstrip()
        return f"One seed: cannot say whether {name} differs from {other} ({text} {direction} this once)."
    n = seeds(difference.n)
    if how == "noise":
        found = f"{around(difference, sign=True)} {of}".rstrip()
        text = f"{name} against {other}: no difference that {n} can tell from noise ({found}"
        if (
            comparison.p is not None and comparison.p < 1 - LEVEL
        ):  # its interval excludes 0: explain why that is not enough
            number = findings.comparisons
            return (
                f"{text}; alone {probability(comparison.p)}, among {number} comparisons {bare(comparison.corrected)})."
            )
        return f"{text}, {probability(comparison.corrected)})."
    spread = f"{amount} ± {plain(difference.half, decimals(difference.half))} {of}".rstrip()
    return f"{name} is {how} than {other} by {spread} ({n}, {probability(comparison.corrected)})."


def _loss(finding: Finding, findings: Findings) -> str:
    if not finding.runs:
        return "it has no runs"
    reasons = Counter(findings.why_lost(run).splitlines()[0] for run in finding.runs)
    (reason, count), several = reasons.most_common(1)[0], len(finding.runs) > 1
    of = f"{count} of {len(finding.runs)} runs " if several else ""
    return f"{of}{reason}".rstrip(".")


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
            "have; an arm that loses its bad seeds looks better than it is."
        )
    return " ".join(parts)
