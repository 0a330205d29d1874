"""Fewer combinations of parameters: those in which every pair of values still meets.

Most faults of combinations need two values together. ``pairs(26 models, 4 drafts, 4 samplings, 2, 2)`` is 104 rows
instead of 1,664.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairs(*choices: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value of each choice, in which each two values of two choices meet at least once.

    The first row has the first value of each. The same choices give the same rows.
    """
    places = [range(len(values)) for values in choices]
    open_ = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(choices)), 2)
        for a, b in itertools.product(places[i], places[j])
    }
    rows: list[list[int]] = []
    while open_:
        row: list[int | None] = [0] * len(choices) if not rows else [None] * len(choices)
        if rows:
            i, a, j, b = min(open_)
            row[i], row[j] = a, b
            for k in range(len(choices)):
                if row[k] is None:
                    row[k] = max(places[k], key=lambda v, k=k: (_gain(row, k, v, open_), -v))
        rows.append([v for v in row if v is not None])
        open_ -= {(i, rows[-1][i], j, rows[-1][j]) for i, j in itertools.combinations(range(len(choices)), 2)}
    return [tuple(values[v] for values, v in zip(choices, row, strict=True)) for row in rows]


def _gain(row: list[int | None], k: int, v: int, open_: set[tuple[int, int, int, int]]) -> int:
    """How many pairs a value would add to a row."""
    return sum(
        ((i, a, k, v) if i < k else (k, v, i, a)) in open_ for i, a in enumerate(row) if a is not None and i != k
    )


def each(*choices: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows in which each value occurs at least once: as many as the longest choice has.

    For two choices that know nothing of each other, of which ``pairs`` would be all.
    """
    return [tuple(values[i % len(values)] for values in choices) for i in range(max(map(len, choices)))]
