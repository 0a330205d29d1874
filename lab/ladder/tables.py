"""The tables of a ladder's report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import fields

from blockwright.lab.ladder.findings import Findings, of_rungs, over_all
from blockwright.lab.ladder.verdict import Speed, Verdict
from blockwright.lab.report.tables import Table, row
from blockwright.lab.report.words import around, bare, plain, short, signed
from blockwright.lab.statistics.law import Rung
from blockwright.lab.statistics.law_check import Conclusion
from blockwright.lab.statistics.law_fit import Estimate, Line, best_split, speed_up_along
from blockwright.lab.statistics.tuning import ENDS


def _speed(log_s: Estimate | None) -> str:
    return "–" if log_s is None else str(Speed.of(log_s))


def speed(findings: Findings, found: Sequence[Verdict]) -> Table | None:
    """s of each arm in several measures."""
    law = findings.law
    if law is None or law.is_wrong:
        return None
    places = ("same tokens a parameter", "same size")
    columns = ("arm", "s, best split", "size ρ_N", "data ρ_D", *places, "at equal FLOPs", "by the clock")
    largest = findings.largest_rung
    lines = []
    for verdict in found:
        if verdict.speed_up is None:
            continue
        best = Speed.of(law.fit.speed_up(verdict.arm))
        apart = law.fit.apart(verdict.arm) if law.why_alike is None else (None, None)
        along = [_along(law, verdict.arm, largest, "ratio"), _along(law, verdict.arm, largest, "data")]
        clock = "–" if verdict.by_clock is None else str(verdict.by_clock)
        lines.append(row(verdict.arm, str(best), *map(_speed, apart), *along, str(verdict.at_equal_flops), clock))
    where = _verdicts_at(found, findings, law)
    note = (
        f"How many times the compute {findings.baseline} needs for the same loss. At the best split of it into size "
        "and data, at every budget, s = ρ_N ρ_D; at the largest rung, if the baseline grows at its tokens per "
        f"parameter, or sees more tokens at its size. {where} At equal FLOPs: × the ratio of training FLOPs "
        "a token and parameter at the largest size; by the clock: × the ratio of measured tokens × parameters a second "
        "there."
    )
    return Table("Speed-up", columns, tuple(lines), frozenset(columns[1:]), note=note) if lines else None


def _verdicts_at(found: Sequence[Verdict], findings: Findings, law: Conclusion) -> str:
    """Where the verdicts are, and why."""
    if all(verdict.at != "tokens per parameter" for verdict in found):
        return "Verdicts are at the best split."
    largest = findings.largest_rung
    parameters, tokens = map(short, best_split(law.fit, 6 * largest.parameters * largest.tokens))
    return (
        f"Verdicts are at the same tokens a parameter: the best split of the largest rung's compute, {parameters} "
        f"parameters and {tokens} tokens, lies outside of the ladder, where ρ_N and ρ_D are extrapolated."
    )


def _along(law: Conclusion, arm: str, rung: Rung, line: Line) -> str:
    found = speed_up_along(law.fit, arm, rung.parameters, rung.tokens, line)
    return str(Speed(found.mean, found.low, found.high))


def residual(findings: Findings) -> Table | None:
    """Mean residual by arm and size."""
    if findings.law is None:
        return None
    sizes = list(findings.outline.sizes)
    pairs = list(zip(findings.law.fit.ladder.rungs, findings.law.fit.residuals, strict=True))
    lines = []
    for arm in findings.arms:
        own = [[float(off) for rung, off in pairs if rung.arm == arm and rung.size == size] for size in sizes]
        lines.append(row(arm, *(signed(math.fsum(each) / len(each), 4) if each else "–" for each in own)))
    return Table("Mean residual, nats", ("arm", *sizes), tuple(lines), frozenset(sizes))


def difference(findings: Findings) -> Table:
    """Each arm against the baseline at every rung, and at all together."""
    lines = []
    for arm in findings.arms[1:]:
        all_rungs = over_all(findings, arm)
        found = [(*place, each) for place, each in of_rungs(findings, arm).items()]
        for size, duration, each in [*([("all", "all", all_rungs)] if all_rungs else []), *found]:
            lines.append(row(arm, size, duration, around(each.interval, sign=True), bare(each.p), str(each.interval.n)))
    columns = ("arm", "size", "duration", "difference", "p", "seeds")
    note = (
        f"Arm minus {findings.baseline} in nats over common seeds, with its 95 % interval, by the noise of all "
        "trainings together and what tuning leaves; p of each alone."
    )
    return Table("Differences a rung", columns, tuple(lines), frozenset(columns[3:]), note=note)


def tuning(findings: Findings) -> Table | None:
    """What the tries of each arm at each size led to."""
    lines = []
    for (size, arm), of in findings.tuned.items():
        edge = f"best is the {ENDS[of.fit.edge]}" if of.fit.edge else ""
        regret = "–" if math.isinf(of.fit.regret) else plain(of.fit.regret, 4)
        curvature = "–" if math.isinf(of.fit.curvature) else plain(of.fit.curvature, 3)
        values = sorted(each.value for each in of.tries)
        tried = f"{len(values)}: {values[0]:.3g} to {values[-1]:.3g}"
        lines.append(row(arm, size, tried, f"{of.fit.vertex:.3g}", curvature, regret, edge))
    columns = ("arm", "size", "tries", "best", "nats an octave²", "regret", "note")
    note = (
        f"Of {findings.outline.tune}, by the mean loss of the durations that it was tried at, of one seed that is not "
        "compared. Larger sizes follow from an arm's mean along a "
        "slope that all arms share."
    )
    return Table("Tuning", columns, tuple(lines), frozenset(columns[3:6]), note=note) if lines else None


def lost(findings: Findings) -> Table | None:
    lines = [row(str(each.job), each.name, each.reason) for each in findings.lost if not each.is_unfinished]
    columns = ("job", "training", "reason")
    return Table("Lost trainings", columns, tuple(lines), wide=frozenset({"reason"})) if lines else None


def rows(findings: Findings) -> str:
    """The rungs as CSV."""
    file = io.StringIO()
    writer = csv.writer(file)
    names = [field.name for field in fields(Rung)]
    writer.writerow(names)
    writer.writerows([getattr(rung, name) for name in names] for rung in findings.rungs)
    return file.getvalue()
