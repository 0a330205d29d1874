"""Sized arms as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.lab.match.budgets import BUDGETS, WORDS
from blockwright.lab.match.sizing import Sized


def arms_table(
    arms: Sequence[Sized], baseline: str, context: int, more: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """A row per arm: its name, what was changed, and every budget with its deviation.

    Args:
        arms: sized
        baseline: the name of the arm the others are compared with
        context: sequence length for FLOPs
        more: further columns, heading → a cell per arm
    """
    matched = {sized.match.budget for sized in arms if sized.match}
    table = Table(box=box.SIMPLE_HEAD, highlight=False, caption=_note(arms, context), caption_justify="left")
    table.add_column("arm", no_wrap=True)
    table.add_column("changed")
    for budget in BUDGETS:
        style = "bold" if budget in matched else ""
        table.add_column(WORDS[budget].replace(" parameters", "\nparameters"), justify="right", header_style=style)
    for heading in more or {}:
        table.add_column(heading, justify="right")
    for i, sized in enumerate(arms):
        name = f"{sized.arm.name} (baseline)" if sized.arm.name == baseline else sized.arm.name
        figures = [_cell(sized, budget, sized.arm.name == baseline) for budget in BUDGETS]
        table.add_row(Text(name), _changed(sized), *figures, *(cells[i] for cells in (more or {}).values()))
    return table


def _changed(sized: Sized) -> str:
    return ",\n".join(f"{path} {old} → {new}" for path, (old, new) in sized.changed.items()) or "nothing"


def _cell(sized: Sized, budget: str, is_base: bool) -> str:
    value, off = getattr(sized.figures, budget), sized.residual.get(budget)
    if value is None:
        return "none"
    written = f"{value:,.0f}"
    if sized.match and sized.match.budget == budget and sized.target is not None:
        return f"{written}\n{_percent(off)} of {sized.target:g}"
    return written if is_base or off is None else f"{written}\n{_percent(off)}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:+,.2f} %"


def _note(arms: Sequence[Sized], context: int) -> str:
    ways: list[Any] = [sized.match for sized in arms if sized.match]
    parts = [f"{WORDS[m.budget]} by {m.by}, within {100 * m.tol:g} %" for m in dict.fromkeys(ways)]
    counted = f"FLOPs (attention not halved) and cache of a token among {context:,}."
    return f"Matched: {'; '.join(parts) or 'nothing'}. {counted}"
