"""Rows with budgets of tokens and of tiles, and batches whose tiles are dealt evenly to processes."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.training.data.dealing import DealtOrder, deal
from blockwright.training.data.order import EpochBatches
from blockwright.training.data.rows import RowOrder, best_fit

loads = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=60))
def test_rows_keep_two_budgets(items: list[tuple[int, int]]) -> None:
    lengths, tiles = (np.array(each) for each in zip(*items, strict=True))
    rows = best_fit(lengths, 20, tiles, 9)
    assert sorted(item for row in rows for item in row) == list(range(len(items)))
    filled = [(lengths[row].sum(), tiles[row].sum()) for row in rows]
    assert all(length <= 20 and load <= 9 for length, load in filled)
    assert sum(length <= 10 and load <= 4 for length, load in filled) <= 1  # two that fit into one would have been one
    alone = best_fit(lengths, 20)
    assert best_fit(lengths, 20, 0 * tiles, 9) == alone
    assert max(lengths[row].sum() for row in alone) <= 20 and sum(lengths[row].sum() <= 10 for row in alone) <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), loads.map(lambda found: found * n))), st.randoms())
def test_hands_have_equally_many_items_and_differ_by_one_load_at_most(
    dealt: tuple[int, list[int]], draw: random.Random
) -> None:
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
