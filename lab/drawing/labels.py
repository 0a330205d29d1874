"""The label of a block: what it says itself, or its parameters as YAML names them."""

from __future__ import annotations

from typing import Any

from blockwright.blocks.base import Block
from blockwright.lab.drawing.parts import Cached
from blockwright.registry.recording import Built
from blockwright.registry.schema import Parameter


def lines(built: Built) -> tuple[str, ...]:
    """The items of a block's label."""
    own = built.block.drawn().lines if isinstance(built.block, Block) else None
    return _of_parameters(built) if own is None else own


def _of_parameters(built: Built) -> tuple[str, ...]:
    """Widths and counts, and what differs from its default."""
    known = built.entry.schema.parameters
    values = {name: _resolved(built, name) for name in built.settings}
    shown = [name for name, value in values.items() if value is not None and _telling(known[name], value)]
    return tuple(_item(name, values[name]) for name in shown)


def _resolved(built: Built, name: str) -> Any:
    """The value of a parameter, or what the block makes of null."""
    value = built.settings[name]
    made = getattr(built.block, name, None) if value is None else value
    return made if isinstance(made, int | float | str | list | tuple) else value


def _telling(parameter: Parameter, value: Any) -> bool:
    counts = isinstance(value, int) and not isinstance(value, bool)
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


def in_letters(parameters: float) -> str:
    """A number of parameters: 235.7 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.4g} {letter}"
    return f"{parameters:,.0f}"


def shape(held: Cached) -> tuple[str, ...]:
    """What is kept: its name and shape, of which tokens, in which precision."""
    last = " + ".join(map(written, held.parts)) if held.parts else written(held.shape[-1])
    size = " × ".join([*(written(n) for n in held.shape[:-1] if n != 1), last])
    kept = {
        "all": "of each token",
        "last": f"of the last {held.tokens:,} tokens",
        "every": f"of each {held.tokens:,} tokens",
        "state": "whatever the length",
    }
    wide = ("fp32",) if held.wide else ()
    return (f"cached: {held.name} {size}", kept[held.keeps], *wide)
