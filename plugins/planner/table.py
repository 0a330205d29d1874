"""A plan as a table: the best layouts, where the step goes, generation, and the published runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from blockwright.lab.card import in_bytes
from blockwright.plugins.planner.generation import Generation
from blockwright.plugins.planner.hardware import Hardware
from blockwright.plugins.planner.layout import Job
from blockwright.plugins.planner.measure import Measured
from blockwright.plugins.planner.memory import traffic
from blockwright.plugins.planner.request import Settings
from blockwright.plugins.planner.search import ERROR, Candidate, Found

# --- what a layout's training costs in all: hours, energy and money; and a candidate as plain numbers -----------------


def totals(candidate: Candidate, hardware: Hardware, settings: Settings) -> dict[str, Any]:
    """GPU-hours, days, energy and money of a run; null where tokens or prices are not given."""
    if settings.tokens is None:
        return dict.fromkeys(("gpu_hours", "days", "kwh", "money"))
    hours = settings.tokens / candidate.speed / 3600
    kwh = hours * hardware.watts * settings.overhead / 1000
    paid = [n * price for n, price in ((hours, settings.gpu_hour), (kwh, settings.kwh)) if price is not None]
    return {"gpu_hours": hours, "days": hours / settings.gpus / 24, "kwh": kwh, "money": sum(paid) if paid else None}


def mfu(candidate: Candidate, hardware: Hardware) -> float:
    """Model FLOPs, scores halved for causality, of the bf16 peak, whatever the precision."""
    return candidate.step.flops_per_second / hardware.bf16


def as_plain(
    candidate: Candidate,
    best: Candidate,
    measured: Measured,
    job: Job,
    hardware: Hardware,
    settings: Settings,
) -> dict[str, Any]:
    """A row of ``--json``: SI units throughout."""
    return {
        "layout": asdict(candidate.layout),
        "runs_here": candidate.layout.trains_here(job),
        "step_seconds": candidate.step.seconds,
        "tokens_per_second_and_gpu": candidate.speed,
        "flops_per_second_and_gpu": candidate.step.flops_per_second,
        "mfu": mfu(candidate, hardware),
        "seconds": candidate.step.parts,
        "memory_bytes": candidate.memory,
        "traffic_bytes": traffic(measured, job, candidate.layout),
        "slower_than_best": best.speed / candidate.speed - 1,
        "tie": is_tie(candidate, best),
        "loses_by_seconds": losses(candidate, best),
        **totals(candidate, hardware, settings),
    }


def is_tie(candidate: Candidate, best: Candidate) -> bool:
    """Whether the model cannot tell which of the two is faster."""
    return best.speed / candidate.speed - 1 <= ERROR


def losses(candidate: Candidate, best: Candidate) -> dict[str, float]:
    """Part of a step → by how many seconds more than the best it takes, the most first; less is negative."""
    names = dict.fromkeys((*best.step.parts, *candidate.step.parts))
    more = {n: candidate.step.parts.get(n, 0.0) - best.step.parts.get(n, 0.0) for n in names}
    return dict(sorted(more.items(), key=lambda item: -item[1]))


WIDTH = 40  # characters of the longest bar


def layouts(found: Found, measured: Measured, job: Job, hardware: Hardware, settings: Settings) -> Table:
    """A numbered line for each of the best layouts, and a column of figures: both fit a terminal of 80 columns."""
    rows = found.best
    ranked = [f"{number}  {_ranked(each, rows[0], job)}" for number, each in enumerate(rows, 1)]
    title = "\n".join([_title(found, job, hardware), *ranked])
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=CAPTION, caption_justify="left", pad_edge=False
    )
    table.add_column("")
    for number in range(1, len(rows) + 1):
        table.add_column(str(number), justify="right")
    memories, travels = [c.memory for c in rows], [traffic(measured, job, c.layout) for c in rows]
    costs = [totals(c, hardware, settings) for c in rows]
    _row(table, "seconds per step", [c.step.seconds for c in rows], "{:,.2f}".format)
    _row(table, "tokens/s per GPU", [c.speed for c in rows], "{:,.0f}".format)
    _row(table, "MFU, scores halved", [mfu(c, hardware) for c in rows], "{:.1%}".format)
    _row(table, "memory per GPU", [sum(m.values()) for m in memories], in_bytes)
    _parts(table, memories)
    _row(table, "traffic per GPU", [sum(t.values()) for t in travels], in_bytes)
    _parts(table, travels)
    for name, label in (("gpu_hours", "GPU-hours"), ("days", "days"), ("kwh", "kWh"), ("money", "money")):
        if costs[0][name] is not None:
            _row(table, label, [cost[name] for cost in costs], (lambda v: f"{v:,.1f}" if v < 100 else f"{v:,.0f}"))
    return table


CAPTION = (
    f"The model is {ERROR:.0%} off on average where it was not fitted: layouts nearer than that are ties. "
    "Traffic: bytes of full buffers in a step."
)


def _title(found: Found, job: Job, hardware: Hardware) -> str:
    return (
        f"{job.gpus:,} {hardware.name}, {job.batch:,} sequences of {job.length:,} tokens per step, {job.precision}: "
        f"{found.considered:,} layouts, {found.fit:,} fit"
    )


def _row(table: Table, label: str, values: Sequence[Any], written: Callable[[Any], str]) -> None:
    table.add_row(label, *map(written, values))


def _parts(table: Table, columns: Sequence[Mapping[str, float]]) -> None:
    """The parts of a figure, without those that all layouts lack."""
    for part in columns[0]:
        if any(sizes := [column[part] for column in columns]):
            _row(table, f"  {part.replace('_', ' ')}", sizes, in_bytes)


def _ranked(candidate: Candidate, best: Candidate, job: Job) -> str:
    """A layout, how much slower than the best it is, and why."""
    name = f"{candidate.layout}{' (trains here)' if candidate.layout.trains_here(job) else ''}"
    if candidate is best:
        return f"{name}: best"
    slower = f"{best.speed / candidate.speed - 1:.1%} slower{' (a tie)' if is_tie(candidate, best) else ''}"
    # The two parts of the step that cost it most against the best
    worst = [(name, more) for name, more in losses(candidate, best).items() if more > 0.005 * best.step.seconds][:2]
    reasons = ", ".join(f"{name} {more:+.2f}" for name, more in worst) or "nothing by itself"
    return f"{name}: {slower}, seconds: {reasons}"


def explained(candidate: Candidate) -> Table:
    """Where the step goes: bars on a terminal, seconds and shares everywhere."""
    drawn = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD, title=f"{candidate.layout}: {candidate.step.seconds:,.2f} s a step")
    for column in ("", "seconds", "share", *([""] if drawn else [])):
        table.add_column(column, justify="right" if column else "left")
    longest = max(candidate.step.parts.values())
    for name, seconds in sorted(candidate.step.parts.items(), key=lambda item: -item[1]):
        if not seconds:
            continue
        bar = "█" * max(1, math.ceil(WIDTH * seconds / longest))
        table.add_row(name, f"{seconds:,.3f}", f"{seconds / candidate.step.seconds:.1%}", *([bar] if drawn else []))
    return table


def generated(found: Generation, title: str) -> Table:
    """What a node generates at most, and the figures that this comes from."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("tokens/s at most", f"{found.tokens_per_second:,.0f}")
    table.add_row("sequences at once", f"{found.batch:,}")
    table.add_row("weights", in_bytes(found.weights))
    table.add_row("caches", in_bytes(found.caches))
    for name, seconds in (("products", found.products), ("attention", found.attention)):
        for cause, value in seconds.items():
            table.add_row(f"{name}, if it {cause}, ms per token", f"{1e3 * value:,.1f}")
    return table


def markdown(rows: Sequence[tuple[str, str, float, float]], summary: Sequence[str]) -> str:
    """The same as ``judged``, for documentation."""
    lines = ["| published run | | measured | model | off by |", "|---|---|---|---|---|"]
    for name, used, measured, model in rows:
        lines.append(f"| {name} | {used} | {measured:,.0f} | {model:,.0f} | {model / measured - 1:+.1%} |")
    return "\n".join([*lines, "", *(f"* {line}" for line in summary), ""])


def judged(rows: Sequence[tuple[str, str, float, float]], summary: Sequence[str]) -> Table:
    """Published runs beside the model.

    Args:
        rows: name, what the run is used for, tokens/s per GPU measured and predicted
        summary: lines below
    """
    table = Table(box=box.SIMPLE_HEAD, caption="\n".join(summary), caption_justify="left")
    for column in ("published run", "", "measured", "model", "off by"):
        table.add_column(column, justify="right" if column in ("measured", "model", "off by") else "left")
    for name, used, measured, model in rows:
        table.add_row(name, used, f"{measured:,.0f}", f"{model:,.0f}", f"{model / measured - 1:+.1%}")
    return table
