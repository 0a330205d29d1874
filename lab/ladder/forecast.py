"""The forecast of a ladder's law: the loss of each arm at a planned size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blockwright.lab.ladder.findings import Findings
from blockwright.lab.report.tables import Table, row
from blockwright.lab.report.words import plain, short
from blockwright.lab.statistics.law_fit import best_split
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
