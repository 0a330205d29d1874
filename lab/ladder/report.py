"""Write DIR/report/ of a ladder: its law and what each arm is worth, as a page, Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blockwright.lab.ladder import charts
from blockwright.lab.ladder.findings import Findings, find
from blockwright.lab.ladder.verdict import Speed, Verdict, document, verdicts
from blockwright.lab.report import build, terminal
from blockwright.lab.report.build import LABELS, VERDICT, Head, Section
from blockwright.lab.report.document import plain as as_json
from blockwright.lab.report.tables import Part, Row, Table
from blockwright.lab.report.words import bare, decimals, plain, short, signed
from blockwright.lab.statistics.law import LINES, Estimate, Rung, best_split, speed_up_along
from blockwright.registry import ConfigError

BEYOND = 4.0  # times the largest size, for which the report forecasts by default


@dataclass(frozen=True)
class Planned:
    """A training that the law is asked about.

    Args:
        parameters: N, without embedding and head
        tokens: D
    """

    parameters: float
    tokens: float


def written(document: dict[str, Any]) -> str:
    """A document as JSON."""
    return json.dumps(as_json(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def conclude(directory: Path, at: str | None = None) -> None:
    """Write the report of a ladder, and print its verdicts.

    Args:
        directory: of the ladder
        at: planned size: ``FLOPS``, or ``PARAMETERS,TOKENS``

    Raises:
        ConfigError: not a ladder, nothing to report, or no such size
    """
    build.need_packages()
    findings = find(directory)
    planned = _planned(findings, at)
    head, sections = head_of(findings), arrange(findings, planned)
    files = {"runs.csv": rows(findings), VERDICT: written(document(findings))}
    terminal.show_head(head, build.save(findings.directory, head, sections, files))
    if at is not None:
        print(_forecast_line(findings, planned))


def _planned(findings: Findings, at: str | None) -> Planned:
    if at is None:
        largest = max(findings.rungs, key=lambda rung: (rung.parameters, rung.tokens))
        return Planned(BEYOND * largest.parameters, BEYOND * largest.tokens)
    try:
        numbers = [float(word) for word in at.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < math.inf for number in numbers):
        rule = "is neither a number of FLOPs nor PARAMETERS,TOKENS"
        raise ConfigError("--at", at, rule, "Write --at 1e18, or --at 1e9,20e9")
    if findings.law is None:
        raise ConfigError("--at", at, "needs a law, and this ladder has none", "Leave it out")
    if len(numbers) == 2:
        return Planned(*numbers)
    if not findings.law.forecasts:
        rule = f"asks how to split FLOPs, which this law does not say. {forecast_lead(findings)}"
        raise ConfigError("--at", at, rule.rstrip("."), "Leave it out")
    return Planned(*best_split(findings.law.fit, numbers[0]))


def head_of(findings: Findings) -> Head:
    """The top of the report."""
    name = str(findings.plan.get("name", ""))
    items = [{"kind": str(v.kind), "label": LABELS[v.kind], "text": v.text} for v in verdicts(findings)]
    order = list(LABELS)
    items.sort(key=lambda item: order.index(item["kind"]))
    return Head(
        title=name,
        kind="Ladder",
        name=name,
        metric=f"{findings.plan['metric']}, nats",
        better="less is better",
        state=_state(findings),
        headline=items,
        method=_method(findings),
        command=str(findings.plan.get("command", "")),
        directory=str(findings.directory),
    )


def _state(findings: Findings) -> str:
    waiting = sum(each.is_unfinished for each in findings.lost)
    gone = len(findings.lost) - waiting
    parts = [f"Not finished: {waiting} trainings have no result yet, so the law may still change."] if waiting else []
    parts += [f"{gone} trainings are lost."] if gone else []
    return " ".join(parts)


def _method(findings: Findings) -> str:
    if findings.law is None:
        return ""
    tuned = f" {findings.outline.tune} is tuned for each arm." if findings.outline.tune else ""
    return (
        "s is how many times the compute the baseline needs for the same loss, by one law of all arms (in brackets: "
        f"its 95 % interval, over {findings.law.fit.ladder.trunks} pairs of size and seed).{tuned}"
    )


def arrange(findings: Findings, planned: Planned) -> list[Section]:
    """The sections of the page, in order."""
    found = verdicts(findings)
    drawn = [charts.speed_ups(findings, found)]
    parts = [
        Section("speed", "What the arms are worth", [d for d in drawn if d], _some(speed_table(findings, found))),
        Section("law", "The law", _curves(findings), _some(residual_table(findings)), law_lead(findings)),
        Section("rungs", "Differences a rung", [], [difference_table(findings)]),
        Section("forecast", "Forecast", [], _some(forecast_table(findings, planned)), forecast_lead(findings)),
        Section("tuning", "How the arms were tuned", [], _some(tuning_table(findings))),
        Section("lost", "What was lost", [], _some(lost_table(findings))),
    ]
    return [part for part in parts if part.figures or part.tables or part.lead]


def _curves(findings: Findings) -> list[Any]:
    figures = [charts.losses(findings, "size"), charts.losses(findings, "data"), charts.residuals(findings)]
    return [figure for figure in figures if figure is not None]


def _some(table: Table | None) -> list[Table]:
    return [] if table is None else [table]


def _row(*cells: str) -> Row:
    return Row(tuple((Part(cell),) for cell in cells))


def _speed(log_s: Estimate | None) -> str:
    return "–" if log_s is None else str(Speed.of(log_s))


def speed_table(findings: Findings, found: Sequence[Verdict]) -> Table | None:
    """s of each arm in several measures."""
    law = findings.law
    if law is None or law.is_wrong:
        return None
    columns = (
        "arm",
        "s",
        "size ρ_N",
        "data ρ_D",
        "at equal FLOPs",
        "by the clock",
        "same tokens a parameter",
        "same size",
    )
    largest = max(findings.rungs, key=lambda rung: (rung.parameters, rung.tokens))
    lines = []
    for verdict in found:
        if verdict.speed_up is None:
            continue
        apart = law.fit.apart(verdict.arm) if law.why_alike is None else (None, None)
        along = [_along(findings, verdict.arm, largest, line) for line in ("ratio", "data")]
        clock = "–" if verdict.by_clock is None else str(verdict.by_clock)
        own = [str(verdict.speed_up), *map(_speed, apart), str(verdict.at_equal_flops), clock, *along]
        lines.append(_row(verdict.arm, *own))
    note = (
        f"s = ρ_N ρ_D: against {findings.baseline}, at the best split of compute into size and data, at every budget. "
        "At equal FLOPs: × the ratio of training FLOPs a token at the largest size; by the clock: × the ratio of "
        "measured tokens a second there. The last two: at the largest rung, if the baseline grows at its tokens per "
        "parameter, or sees more tokens at its size."
    )
    return Table("Speed-up", columns, tuple(lines), frozenset(columns[1:]), note=note) if lines else None


def _along(findings: Findings, arm: str, rung: Rung, line: str) -> str:
    assert findings.law is not None and line in LINES
    found = speed_up_along(findings.law.fit, arm, rung.parameters, rung.tokens, line)  # type: ignore[arg-type]
    return str(Speed(found.mean, found.low, found.high))


def law_lead(findings: Findings) -> str:
    """The law in a sentence, and its checks."""
    law = findings.law
    if law is None:
        return ""
    alpha, beta = law.fit.exponents
    parts = [
        f"L = {law.fit.floor:.3f} + A (ρ_N N)^−{alpha:.3f} + B (ρ_D D)^−{beta:.3f}, the same for all arms but for ρ."
    ]
    if law.lack_of_fit is not None:
        parts.append(f"Lack of fit: p = {law.lack_of_fit:.2g} (it counts as wrong below 0.01).")
    if law.left_out is not None:
        off = law.left_out
        parts.append(
            f"The largest size is {signed(off.mean, 4)} ± {plain(off.half, 4)} from the forecast of the others."
        )
    parts.append(f"Condition number {law.fit.condition:.0f}.")
    return " ".join(parts)


def residual_table(findings: Findings) -> Table | None:
    """Mean residual by arm and size."""
    if findings.law is None:
        return None
    sizes = list(findings.outline.sizes)
    pairs = list(zip(findings.law.fit.ladder.rungs, findings.law.fit.residuals, strict=True))
    lines = []
    for arm in findings.arms:
        own = [[float(off) for rung, off in pairs if rung.arm == arm and rung.size == size] for size in sizes]
        lines.append(_row(arm, *(signed(math.fsum(each) / len(each), 4) if each else "–" for each in own)))
    return Table("Mean residual, nats", ("arm", *sizes), tuple(lines), frozenset(sizes))


def difference_table(findings: Findings) -> Table:
    """Each arm against the baseline at every rung, paired over seeds."""
    lines = []
    for arm in findings.arms[1:]:
        for (size, duration), compared in findings.differences(arm).items():
            of = compared.difference
            mean = signed(of.mean, decimals(of.half))
            around = mean if of.half is None else f"{mean} ± {plain(of.half, decimals(of.half))}"
            lines.append(_row(arm, size, duration, around, bare(compared.p), str(of.n)))
    columns = ("arm", "size", "duration", "difference", "p", "seeds")
    note = f"Arm minus {findings.baseline} in nats over common seeds, with its 95 % interval; p of each alone."
    return Table("Differences a rung", columns, tuple(lines), frozenset(columns[3:]), note=note)


def forecast_lead(findings: Findings) -> str:
    law = findings.law
    if law is None or law.forecasts:
        return ""
    return "No forecast: " + (
        "one law does not fit these arms."
        if law.is_wrong
        else "the largest size is off the law of the others."
        if law.misses_largest
        else "the ladder does not fix the shape of the law."
    )


def forecast_table(findings: Findings, planned: Planned) -> Table | None:
    """The loss of each arm at a planned size, and how many FLOPs it takes."""
    law = findings.law
    if law is None or not law.forecasts:
        return None
    cells = findings.outline.sizes[findings.largest].arms
    lines = []
    for arm in findings.arms:
        loss = law.fit.loss(arm, planned.parameters, planned.tokens)
        flops = cells[arm].flops / cells[arm].parameters * planned.parameters * planned.tokens
        lines.append(_row(arm, f"{plain(loss.mean, 3)} ± {plain(loss.half, 3)}", short(flops)))
    columns = ("arm", "loss, nats", "training FLOPs")
    note = (
        f"At {short(planned.parameters)} parameters without embedding and head and {short(planned.tokens)} tokens; "
        f"FLOPs as at the largest size, per parameter. Of another size: blockwright ladder {findings.directory} "
        "--at PARAMETERS,TOKENS, or --at FLOPS."
    )
    return Table("Forecast", columns, tuple(lines), frozenset(columns[1:]), note=note)


def _forecast_line(findings: Findings, planned: Planned) -> str:
    law = findings.law
    at = f"{short(planned.parameters)} parameters, {short(planned.tokens)} tokens"
    if law is None or not law.forecasts:
        return f"{at}: {forecast_lead(findings)}"
    losses = {arm: law.fit.loss(arm, planned.parameters, planned.tokens) for arm in findings.arms}
    return f"{at}: {', '.join(f'{arm} {plain(x.mean, 3)} ± {plain(x.half, 3)}' for arm, x in losses.items())}"


def tuning_table(findings: Findings) -> Table | None:
    """What the tries of each arm at each size led to."""
    lines = []
    for (size, arm), of in findings.tuned.items():
        edge = {"low": "best is the smallest", "high": "best is the largest", None: ""}[of.fit.edge]
        regret = "–" if math.isinf(of.fit.regret) else plain(of.fit.regret, 4)
        curvature = "–" if math.isinf(of.fit.curvature) else plain(of.fit.curvature, 3)
        values = sorted(each.value for each in of.tries)
        tried = f"{len(values)}: {values[0]:.3g} to {values[-1]:.3g}"
        lines.append(_row(arm, size, tried, f"{of.fit.vertex:.3g}", curvature, regret, edge))
    columns = ("arm", "size", "tries", "best", "nats an octave²", "regret", "note")
    note = (
        f"Of {findings.outline.tune}, one seed that is not compared. Larger sizes take the line through the tuned ones."
    )
    return Table("Tuning", columns, tuple(lines), frozenset(columns[3:6]), note=note) if lines else None


def lost_table(findings: Findings) -> Table | None:
    lines = [_row(str(each.job), each.name, each.reason) for each in findings.lost if not each.is_unfinished]
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
