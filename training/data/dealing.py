"""Rows of a batch dealt to processes so that each has about as many tiles of pictures: the slowest sets the pace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from blockwright.training.data.packing import Ints
from blockwright.training.data.rows import RowOrder


def deal(loads: Ints, n: int) -> list[list[int]]:
    """Deal items to n hands of equal number, the heaviest first, each to the lightest hand with room.

    Args:
        loads: of the items; n divides their number
        n: hands

    Returns:
        the items of each hand, ascending
    """
    hands: list[list[int]] = [[] for _ in range(n)]
    room, sums = len(loads) // n, [0] * n
    for item in np.argsort(-loads, kind="stable").tolist():
        hand = min((k for k in range(n) if len(hands[k]) < room), key=sums.__getitem__)
        hands[hand].append(item)
        sums[hand] += int(loads[item])
    return [sorted(hand) for hand in hands]


@dataclass(frozen=True)
class DealtOrder(RowOrder):
    """The order of ``RowOrder``, the rows of each batch dealt evenly to the processes.

    A batch has the same rows for every number of processes, and the loss divides by the scored tokens of all: dealing
    changes which process sees a row, and nothing else.

    Args:
        loads: tiles of each row
        world_size: data-parallel processes
    """

    loads: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    world_size: int = 1

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Ints]]:
        for length, rows in super().batches(first, last):
            yield length, rows[np.concatenate(deal(self.loads[rows], self.world_size))]
