"""Which rows of an attention's weights its scores are proportional to, head by head: what QK-clip scales."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class ScoreRows(NamedTuple):
    """Rows of a weight or a bias that hold one head after the other.

    name: of the parameter in the attention, e.g. ``query.weight``
    height: rows of a head
    side: ``query`` or ``key``, if a head has both; ``alone``, if what the rows are multiplied with is shared by heads
    part: which rows of each head make its scores
    """

    name: str
    height: int
    side: Literal["query", "key", "alone"]
    part: slice = slice(None)


def row_factors(rows: ScoreRows, total: int, factor: Tensor, alpha: float) -> Tensor:
    """The factor on each of ``total`` rows that multiplies the scores of groups of heads by ``factor``, [K].

    A group has one key head. Of a factor, α falls to the queries (factor^α) and 1 − α to the keys.
    """
    heads = total // rows.height
    power = {"query": alpha, "key": 1 - alpha, "alone": 1.0}[rows.side]
    factors = factor.new_ones(heads, rows.height)
    factors[:, rows.part] = factor.repeat_interleave(heads // len(factor))[:, None] ** power
    return factors.flatten()
