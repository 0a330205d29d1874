"""What a transfer has measured: where the best rates are, and what the transferred one costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from blockwright.lab.statistics.intervals import Comparison, compare, interval
from blockwright.lab.statistics.tuning import ENDS
from blockwright.lab.sweep.tuning import COMPARE
from blockwright.lab.transfer.design import BASE, RULES, STANDARD, TRANSFERRED, check, fits, tries
from blockwright.training.result import Result
from blockwright.training.writing import write_json

FILE = "transfer.json"


def read(directory: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of an ended transfer, as plain types.

    Returns:
        ``widths``; ``rates``: arm → ``best``, ``edge``, ``regret`` and ``tries``; ``octaves``: arm at the larger width
        → how far its best rate is from the base's; ``loss``: arm → mean, interval and number of seeds; ``excess``: loss
        of the transferred rate over the tuned one; ``standard``: loss of tuned standard parametrisation over the
        transferred rate; both with intervals, paired over seeds; null without a common seed

    Raises:
        ConfigError: the plan is damaged
    """
    check(plan)
    results = {job["job"]: Result.read(directory / str(job["job"])) for job in plan["jobs"]}
    best, tried = fits(plan, results), tries(plan, results)
    losses: dict[str, dict[int, float]] = {TRANSFERRED: {}, RULES: {}, STANDARD: {}}
    for job in plan["jobs"]:
        value = results[job["job"]].value(plan["metric"])
        if job["stage"] == COMPARE and value is not None:
            losses[job["arm"]][job["seed"]] = value
    return {
        "widths": plan["widths"],
        "metric": plan["metric"],
        "rates": {
            arm: {
                "best": each.vertex,
                "edge": each.edge,
                "regret": _finite(each.regret),
                "tries": {repr(t.value): _finite(t.loss) for t in sorted(tried[arm], key=lambda t: t.value)},
            }
            for arm, each in best.items()
        },
        "octaves": {arm: math.log2(best[arm].vertex / best[BASE].vertex) for arm in (RULES, STANDARD)},
        "loss": {arm: vars(interval(list(of.values()))) if of else None for arm, of in losses.items()},
        "excess": _difference(compare(losses[TRANSFERRED], losses[RULES])),
        "standard": _difference(compare(losses[STANDARD], losses[TRANSFERRED])),
    }


def _difference(found: Comparison | None) -> dict[str, Any] | None:
    return None if found is None else {**vars(found.difference), "p": found.p}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(directory: Path, answer: Mapping[str, Any]) -> Path:
    """Write it as ``transfer.json``, and return the path."""
    write_json(directory / FILE, answer)
    return directory / FILE


def table(answer: Mapping[str, Any]) -> Table:
    """A row for each arm."""
    small, large = answer["widths"]
    title = f"d_model {small} → {large}, {answer['metric']}"
    shown = Table("rate of", "best rate", "octaves from the base", "loss there", title=title)
    names = {BASE: f"base, {small}", RULES: f"rules, {large}", STANDARD: f"standard, {large}"}
    for arm, name in names.items():
        of = answer["rates"][arm]
        edge = f" ({ENDS[of['edge']]} tried)" if of["edge"] else ""
        moved = f"{answer['octaves'][arm]:+.2f}" if arm in answer["octaves"] else ""
        shown.add_row(name, f"{of['best']:.3g}{edge}", moved, _shown(answer["loss"].get(arm)))
    transferred = (f"rules, {large}, transferred", f"{answer['rates'][BASE]['best']:.3g}", "+0.00")
    shown.add_row(*transferred, _shown(answer["loss"][TRANSFERRED]))
    return shown


def lines(answer: Mapping[str, Any]) -> list[str]:
    """What the table means, in words."""
    said = [
        f"No verdict: the best rate of {arm} is the {ENDS[each['edge']]} tried."
        for arm, each in answer["rates"].items()
        if each["edge"]
    ]
    for key, text in (
        ("excess", "the transferred rate costs {} over the tuned one"),
        ("standard", "tuned standard parametrisation is {} above the transferred rate under rules"),
    ):
        if answer[key] is not None:
            said.append(text.format(f"{_shown(answer[key], '+')} nats"))
    return said


def _shown(of: Mapping[str, Any] | None, sign: str = "") -> str:
    if of is None:
        return ""
    half = "" if of["low"] is None else f" ± {(of['high'] - of['low']) / 2:.4f}"
    return f"{of['mean']:{sign}.4f}{half}"
