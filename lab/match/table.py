"""Sized arms as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.lab.card import scaled
from blockwright.lab.match.sizing import BUDGETS, WORDS, Sized
from blockwright.lab.report.words import percent

HEADS = {  # of columns that fit a terminal of 80
    "params": "params",
    "active_params": "active\nparams",
    "flops": "FLOPs\nper token",
    "cache_bytes": "cache B\nper token",
}


def arms_table(
    arms: Sequence[Sized], baseline: str, context: int, more: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """A row per arm: its name, and every budget with its deviation; below, the sizes that were changed.

    Args:
        arms: sized
        baseline: the name of the arm the others are compared with
        context: sequence length for FLOPs
        more: further columns, heading → a cell per arm
    """
    matched = {sized.match.budget for sized in arms if sized.match}
    caption = Text("\n".join([_note(arms, baseline, context), *filter(None, map(_changed, arms))]))
    table = Table(box=box.SIMPLE_HEAD, highlight=False, caption=caption, caption_justify="left")
    table.add_column("arm", overflow="fold")
    for budget in BUDGETS:
        style = "bold" if budget in matched else ""
        table.add_column(HEADS[budget], justify="right", header_style=style, no_wrap=True)
    for heading in more or {}:
        table.add_column(heading, justify="right", no_wrap=True)
    for i, sized in enumerate(arms):
        name = f"{sized.arm.name} (baseline)" if sized.arm.name == baseline else sized.arm.name
        figures = [_cell(sized, budget, sized.arm.name == baseline) for budget in BUDGETS]
        table.add_row(Text(name), *figures, *(cells[i] for cells in (more or {}).values()))
    return table


def _changed(sized: Sized) -> str:
    changes = ", ".join(f"{path} {old} → {new}" for path, (old, new) in sized.changed.items())
    return f"{sized.arm.name}: {changes}" if changes else ""


def _cell(sized: Sized, budget: str, is_base: bool) -> str:
    value, off = getattr(sized.figures, budget), sized.residual.get(budget)
    if value is None:
        return "none"
    written = scaled(value)
    if sized.match and sized.match.budget == budget and sized.target is not None:
        return f"{written}\n{percent(value / sized.target - 1)}\nof {sized.target:g}"
    return written if is_base or off is None else f"{written}\n{percent(off)}"


def _note(arms: Sequence[Sized], baseline: str, context: int) -> str:
    ways: list[Any] = [sized.match for sized in arms if sized.match]
    others = [sized.arm.name for sized in arms if not sized.match and sized.arm.name != baseline]
    parts = [f"{WORDS[m.budget]} by {m.by}, within {100 * m.tol:g} %" for m in dict.fromkeys(ways)]
    parts += [f"{', '.join(others)} by nothing"] if parts and others else []
    counted = f"FLOPs (attention not halved) and cache per token of a sequence of {context:,} tokens."
    return f"Matched: {'; '.join(parts) or 'nothing'}. {counted}"
