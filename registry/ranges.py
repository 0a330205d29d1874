"""Number ranges in annotations: ``n_heads: Count``, ``eps: Positive``.

The bounds are those of the library annotated-types, so a plug-in may also write ``Annotated[int, Ge(2)]``. A float must
be finite unless its annotation has ``UNBOUNDED``. Annotations are checked wherever a configuration is read
(registry/schema.py, training/configuration/instantiate.py), and by constructors called from Python
(registry/enforcing.py). Rules between two parameters are left to the constructor.
"""

from __future__ import annotations

import math
import operator
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

UNBOUNDED = "may be infinite"

Count = Annotated[int, Ge(1)]  # 1, 2, 3, …
Whole = Annotated[int, Ge(0)]  # 0, 1, 2, …
Taps = Annotated[int, Ge(1), Le(1024)]  # tokens that a convolution sees, one after the other
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # NumPy's generators take no larger one
Number = Annotated[float, "any finite number"]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Stretch = Annotated[float, Ge(1)]  # a factor of at least 1
Fraction = Annotated[float, Ge(0), Le(1)]  # 0 to 1, both included
Share = Annotated[float, Gt(0), Le(1)]  # above 0, up to 1
BelowOne = Annotated[float, Ge(0), Lt(1)]
ProperFraction = Annotated[float, Gt(0), Lt(1)]

_SIGNS = {Ge: ("≥", "at least"), Gt: (">", "above"), Le: ("≤", "at most"), Lt: ("<", "below")}
_HELD = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}


def parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split an annotation into its type and the metadata of ``Annotated``."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    plain, *more = typing.get_args(hint)
    return plain, tuple(more)


def within(value: float, more: tuple[Any, ...]) -> bool:
    """Whether a number is finite, where required, and within the bounds in ``more``."""
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or UNBOUNDED not in more):
        return False
    return all(_HELD[kind](value, limit) for kind, limit in _bounds(more))


def in_signs(more: tuple[Any, ...]) -> str:
    """Bounds for the catalogue, `` ≥ 1`` or `` in [0, 1)``; empty for none."""
    bounds = sorted(_bounds(more), key=lambda bound: bound[0] in (Le, Lt))
    if len(bounds) != 2:
        return "".join(f" {_SIGNS[kind][0]} {_shown(limit)}" for kind, limit in bounds)
    (low, least), (high, most) = bounds
    return f" in {'[' if low is Ge else '('}{_shown(least)}, {_shown(most)}{']' if high is Le else ')'}"


def in_words(more: tuple[Any, ...]) -> str:
    """Bounds for messages, `` of at least 0 and below 1``; empty for none."""
    words = " and ".join(f"{_SIGNS[kind][1]} {_shown(limit)}" for kind, limit in _bounds(more))
    return f" {'of ' if words.startswith('at') else ''}{words}" if words else ""


def numbers(hint: Any) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """Every ``int`` and ``float`` in an annotation, with its ``Annotated`` metadata."""
    plain, more = parts(hint)
    if plain in (int, float):
        yield plain, more
    for part in typing.get_args(plain) if typing.get_origin(plain) is not typing.Literal else ():
        yield from numbers(part)


def _bounds(more: tuple[Any, ...]) -> list[tuple[type, Any]]:
    return [(type(b), getattr(b, type(b).__name__.lower())) for b in more if type(b) in _SIGNS]


def _shown(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"
