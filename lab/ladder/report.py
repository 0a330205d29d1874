"""Write DIR/report/ of a ladder: its law and what each arm is worth, as a page, Markdown, JSON and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.ladder import views
from blockwright.lab.ladder.findings import Findings, find
from blockwright.lab.ladder.verdict import document, verdicts
from blockwright.lab.report import build, terminal
from blockwright.lab.report.build import VERDICT
from blockwright.lab.report.page import LABELS, Head, Section, save, some
from blockwright.lab.report.tables import Table, row
from blockwright.lab.report.words import plain, short, signed
from blockwright.lab.statistics.law_fit import best_split
from blockwright.registry import ConfigError
from blockwright.registry.command import strict_json
from blockwright.registry.errors import require
from blockwright.training.result import Result

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


def planned(findings: Findings, at: str | None) -> Planned:
    """The training that ``--at`` names; without it, of models and tokens beyond the largest.

    Raises:
        ConfigError: it names none, or the law does not say
    """
    if at is None:
        largest = findings.largest_rung
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
        rule = f"asks how to split FLOPs, which this law does not say. {lead(findings)}"
        raise ConfigError("--at", at, rule.rstrip("."), "Leave it out")
    return Planned(*best_split(findings.law.fit, numbers[0]))


def lead(findings: Findings) -> str:
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


def table(findings: Findings, planned: Planned) -> Table | None:
    """The loss of each arm at a planned size, and how many FLOPs it takes."""
    law = findings.law
    if law is None or not law.forecasts:
        return None
    cells = findings.outline.sizes[findings.largest].arms
    lines = []
    for arm in findings.arms:
        loss = law.fit.loss(arm, planned.parameters, planned.tokens)
        flops = cells[arm].flops / cells[arm].parameters * planned.parameters * planned.tokens
        lines.append(row(arm, f"{plain(loss.mean, 3)} ± {plain(loss.half, 3)}", short(flops)))
    columns = ("arm", "loss, nats", "training FLOPs")
    note = (
        f"At {short(planned.parameters)} parameters without embedding and head and {short(planned.tokens)} tokens; "
        f"FLOPs as at the largest size, per parameter. ± is that of a true law: one that bends between here and there "
        f"is not in it. Of another size: blockwright ladder {findings.directory} "
        "--at PARAMETERS,TOKENS, or --at FLOPS."
    )
    return Table("Forecast", columns, tuple(lines), frozenset(columns[1:]), note=note)


def line(findings: Findings, planned: Planned) -> str:
    law = findings.law
    at = f"{short(planned.parameters)} parameters, {short(planned.tokens)} tokens"
    if law is None or not law.forecasts:
        return f"{at}: {lead(findings)}"
    losses = {arm: law.fit.loss(arm, planned.parameters, planned.tokens) for arm in findings.arms}
    return f"{at}: {', '.join(f'{arm} {plain(x.mean, 3)} ± {plain(x.half, 3)}' for arm, x in losses.items())}"


def need_packages() -> None:
    """Refuse to start without the packages of the fit and of the report.

    Raises:
        ConfigError: the extra ``lab`` is not installed
    """
    require("lab", "scipy", "threadpoolctl", path="blockwright.lab.ladder")
    build.need_packages()


def show(directory: Path, at: str | None = None) -> None:
    """Write the report of a ladder, and print its verdicts.

    Args:
        directory: of the ladder
        at: planned size: ``FLOPS``, or ``PARAMETERS,TOKENS``

    Raises:
        ConfigError: not a ladder, nothing to report, or no such size
    """
    need_packages()
    findings = find(directory)
    at_size = planned(findings, at)
    head, sections = head_of(findings), arrange(findings, at_size)
    files = {"runs.csv": views.rows(findings), VERDICT: f"{strict_json(document(findings))}\n"}
    terminal.show_head(head, save(findings.directory, head, sections, files))
    if at is not None:
        print(line(findings, at_size))


def head_of(findings: Findings) -> Head:
    """The top of the report."""
    name = str(findings.plan.get("name", ""))
    items = [{"kind": str(v.kind), "label": LABELS[v.kind], "text": v.text} for v in verdicts(findings)]
    order = list(LABELS)
    items.sort(key=lambda item: order.index(item["kind"]))
    waiting = sum(each.is_unfinished for each in findings.lost)
    gone = len(findings.lost) - waiting
    parts = [f"Not finished: {waiting} trainings have no result yet, so the law may still change."] if waiting else []
    parts += [f"{gone} trainings are lost."] if gone else []
    state = " ".join(parts)
    return Head(
        title=name,
        kind="Ladder",
        name=name,
        metric=f"{findings.plan['metric']}, nats",
        better="less is better",
        state=state,
        headline=items,
        method=_method(findings),
        command=str(findings.plan.get("command", "")),
        directory=str(findings.directory),
    )


def _method(findings: Findings) -> str:
    if findings.law is None:
        return ""
    tuned = f" {findings.outline.tune} is tuned for each arm." if findings.outline.tune else ""
    compared = sum(each.p is not None for each in verdicts(findings))
    holm = f"; p is corrected for {compared} comparisons at once (Holm)" if compared > 1 else ""
    return (
        "s is how many times the compute the baseline needs for the same loss, by one law of all arms (in brackets: "
        f"its 95 % interval, over {findings.law.fit.ladder.trunks} pairs of size and seed{holm}).{tuned} "
        "A difference counts at p < 0.05."
    )


def arrange(findings: Findings, planned: Planned) -> list[Section]:
    """The sections of the page, in order."""
    found = verdicts(findings)
    drawn = [views.speed_ups(findings, found)]
    figures = [views.losses(findings, "size"), views.losses(findings, "data"), views.residuals(findings)]
    curves = [figure for figure in figures if figure is not None]
    parts = [
        Section("speed", "What the arms are worth", [d for d in drawn if d], some(views.speed(findings, found))),
        Section("law", "The law", curves, some(views.residual(findings)), law_lead(findings)),
        Section("rungs", "Differences a rung", [], [views.difference(findings)]),
        Section("forecast", "Forecast", [], some(table(findings, planned)), lead(findings)),
        Section("tuning", "How the arms were tuned", [], some(views.tuning(findings))),
        Section("lost", "What was lost", [], some(views.lost(findings))),
    ]
    return [part for part in parts if part.figures or part.tables or part.lead]


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


def conclude(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
    """Print the verdicts of a ladder and write its report; of ``lab.sweep.seams.Ending``."""
    show(directory)
