"""Rows of pictures dealt to processes: evenly, and so that nothing else changes."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.plugins.vision.data.picture_module import DealtOrder, deal
from blockwright.training.data.order import EpochBatches
from blockwright.training.data.rows import RowOrder

loads = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), loads.map(lambda found: found * n))), st.randoms())
def test_hands_have_equally_many_items_and_differ_by_one_load_at_most(dealt, draw):
    n, values = dealt
    draw.shuffle(values)
    hands = deal(np.array(values), n)
    assert sorted(item for hand in hands for item in hand) == list(range(len(values)))
    assert {len(hand) for hand in hands} == {len(values) // n}
    sums = [sum(values[item] for item in hand) for hand in hands]
    assert max(sums) - min(sums) <= max(values)


def test_dealing_changes_who_sees_a_row_and_nothing_else_also_from_the_middle_on() -> None:
    tiles = np.random.RandomState(0).randint(0, 20, 50)
    alone = RowOrder(50, 8, 3)
    uneven, even = [], []
    for n in (1, 2, 4):
        order = DealtOrder(50, 8, 3, tiles, n)
        ranks = [list(EpochBatches(order, rank, n)) for rank in range(n)]
        assert [list(EpochBatches(order, rank, n, start=4)) for rank in range(n)] == [rows[4:] for rows in ranks]
        for parts, rows in zip(zip(*ranks, strict=True), alone.epoch(0), strict=True):
            assert sorted(itertools.chain(*parts)) == sorted(rows)
            even.append(np.ptp([tiles[part].sum() for part in parts]))
            uneven.append(np.ptp([tiles[part].sum() for part in np.split(rows, n)]))
    assert list(EpochBatches(DealtOrder(50, 8, 3, tiles))) == list(EpochBatches(alone))
    assert sum(even) < 0.3 * sum(uneven)
