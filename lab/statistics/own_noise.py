"""The noise of each arm of a sweep by itself, so that the gain of an option against noise can be seen."""

from __future__ import annotations

import math
from collections.abc import Mapping

LEAST = 3  # arms and seeds, below which the noise of one arm cannot be separated from that of the others


def own_noise(table: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Standard deviation of each arm over seeds, without what a seed does to all arms alike.

    Grubbs 1948, doi 10.1214/aoms/1177730261: with residuals r of the table of A arms and S common seeds,

        q_a = Σ r² / (S − 1),    v_a = A / (A − 2) (q_a − Σ q / (A (A − 1)))

    Args:
        table: arm → seed → value; arms without a value are left out, and so are seeds that an arm lacks

    Returns:
        arm → σ, 0 where the estimate is below it; empty for fewer than three arms or seeds
    """
    rows = {name: row for name, row in table.items() if row}
    seeds = sorted(set.intersection(*(set(row) for row in rows.values()))) if rows else []
    arms, count = len(rows), len(seeds)
    if arms < LEAST or count < LEAST:
        return {}
    of_seed = {seed: math.fsum(row[seed] for row in rows.values()) / arms for seed in seeds}
    squares = {}
    for name, row in rows.items():
        apart = [row[seed] - of_seed[seed] for seed in seeds]
        mean = math.fsum(apart) / count
        squares[name] = math.hypot(*(each - mean for each in apart)) / math.sqrt(count - 1)
    total = math.hypot(*squares.values()) / math.sqrt(arms * (arms - 1))
    scale = math.sqrt(arms / (arms - 2))
    return {name: scale * math.sqrt(max(q - total, 0.0)) * math.sqrt(q + total) for name, q in squares.items()}
