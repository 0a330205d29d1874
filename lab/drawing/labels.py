"""The label of a block: what it says itself, or its parameters as YAML names them."""

from __future__ import annotations

from typing import Any

from blockwright.blocks.base import Drawn
from blockwright.registry.recording import Built
from blockwright.registry.schema import Parameter


def lines(built: Built, drawn: Drawn) -> tuple[str, ...]:
    """The items of a block's label: its own, or widths, counts, and what differs from its default."""
    if drawn.lines is not None:
        return drawn.lines
    known = built.entry.schema.parameters
    values = {name: built.settled(name) for name in built.settings if name not in drawn.hides}
    shown = [
        name
        for name, value in values.items()
        if value is not None and (name in drawn.shows or _telling(known[name], value))
    ]
    return tuple(_item(name, values[name]) for name in shown)


def _telling(parameter: Parameter, value: Any) -> bool:
    real = isinstance(parameter.default, float)  # 40 and 40.0 are the same
    counts = isinstance(value, int) and not isinstance(value, bool) and value != 1 and not real
    return counts or value != parameter.default


def _item(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {written(value)}"


def written(value: Any) -> str:
    """A setting in few letters: 12,288, 0.707, [a, b, …]."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value[:2]))}{', …' if len(value) > 2 else ''}]"
    return str(value)
