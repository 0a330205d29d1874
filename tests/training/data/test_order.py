"""The order of windows, also of several lengths, and rows dealt to processes: a pure function of seed and batch."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.registry import ConfigError
from blockwright.training.data.order import EpochBatches, Lengths, LineBatches, MixedOrder, Order, Stage, read_lengths
from blockwright.training.data.rows import best_fit

orders = st.builds(
    Order,
    n_tokens=st.integers(40, 400),
    sequence_length=st.integers(2, 9),
    batch_size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
)


@settings(max_examples=40)
@given(orders, st.integers(0, 5))
def test_windows_of_an_epoch_tile_the_stream_without_overlap(order, epoch):
    offsets = order.epoch(epoch)
    assert offsets.shape == (order.n_batches, order.batch_size)
    covered = (offsets.ravel()[:, None] + np.arange(order.sequence_length)) % order.n_tokens
    assert len(np.unique(covered)) == covered.size
    assert order.n_tokens - covered.size < order.sequence_length * (order.batch_size + 1)


def test_epochs_differ_in_order_and_in_where_windows_begin():
    order = Order(1000, 10, 4, seed=0)
    assert (order.epoch(0) == order.epoch(0)).all()
    epochs = [order.epoch(epoch) for epoch in range(4)]
    # 10 divides 1000, so all windows of an epoch begin at one remainder, which is where the epoch began.
    assert len({tuple(np.unique(offsets % 10)) for offsets in epochs}) > 1
    assert (np.diff(epochs[0].ravel()) % 1000 != 10).any()
    assert (Order(1000, 10, 4, seed=1).epoch(0) != epochs[0]).any()
    # the same on every machine and in every release
    assert Order(100, 10, 2, seed=7).epoch(3).tolist() == [[36, 26], [46, 6], [56, 96], [86, 66], [16, 76]]


def test_no_token_is_left_out_of_every_epoch():
    order = Order(103, 10, 3, seed=0)
    seen = {(o + i) % 103 for epoch in range(8) for o in order.epoch(epoch).ravel().tolist() for i in range(10)}
    assert seen == set(range(103))


@settings(max_examples=40)
@given(orders, st.integers(0, 60), st.sampled_from([1, 2, 4]))
def test_ranks_together_serve_the_global_batch(order, start, world_size):
    if order.batch_size % world_size:
        return
    whole = list(EpochBatches(order, start=start))
    ranks = [list(EpochBatches(order, rank, world_size, start=start)) for rank in range(world_size)]
    assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == whole


@settings(max_examples=40)
@given(orders, st.integers(0, 60))
def test_starting_late_leaves_out_what_was_consumed_and_nothing_else(order, start):
    batches = EpochBatches(order)
    endless = [batch for _ in range(-(-start // len(batches)) + 1) for batch in batches]
    late = EpochBatches(order, start=start)
    rest = list(late)
    assert rest == endless[start : (start // len(late) + 1) * len(late)]
    assert late.start % len(late) == 0 and len(late) == len(batches)
    assert list(late) == order.epoch(start // len(late) + 1).tolist()


def test_iterating_without_training_serves_the_same_batches_again_and_a_cap_spreads_windows_over_the_split():
    order = Order(400, 10, 4, seed=0)
    batches = EpochBatches(order, consumed=lambda: 13)
    assert list(batches) == list(batches) == order.epoch(1)[3:].tolist()
    assert [*chain(*LineBatches(1001, 10, 4, n_windows=5))] == [0, 200, 400, 600, 800]


@settings(max_examples=40)
@given(orders, st.integers(1, 20), st.integers(0, 60))
def test_a_short_epoch_of_the_trainer_crosses_the_ends_of_ours(order, epoch_length, start):
    batches = EpochBatches(order, epoch_length=epoch_length, start=start)
    length = min(epoch_length, order.n_batches)
    expected = [order.epoch(g // order.n_batches)[g % order.n_batches].tolist() for g in range(start, start + length)]
    assert list(batches) == expected[: length - start % length]


@settings(max_examples=40)
@given(
    st.integers(10, 200),
    st.integers(2, 9),
    st.sampled_from([4, 8, 12]),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from([1, 2, 4]),
)
def test_evaluation_serves_each_window_once_and_ranks_equally_many(n_tokens, length, batch_size, n_windows, world_size):
    ranks = [list(LineBatches(n_tokens, length, batch_size, n_windows, r, world_size)) for r in range(world_size)]
    whole = list(LineBatches(n_tokens, length, batch_size, n_windows))
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    assert len(LineBatches(n_tokens, length, batch_size, n_windows, 0, world_size)) == len(ranks[0]) == len(whole)
    together = [[o for part in parts for o in part if o >= 0] for parts in zip(*ranks, strict=True)]
    assert together == whole
    offsets = [*chain(*whole)]
    assert offsets == sorted(set(offsets)) and offsets[0] == 0 and all(o % length == 0 for o in offsets)
    every = -(-(n_tokens - 1) // length)
    assert len(offsets) == min(n_windows or every, every)
    if n_windows is None:
        assert offsets[-1] + length + 1 >= n_tokens > offsets[-1] + 1


GROWING = Lengths((Stage({8: 0.6, 2: 0.4}, 10), Stage({16: 0.6, 2: 0.4})))


def mixed(seed: int = 0, lengths: Lengths = GROWING) -> MixedOrder:
    return MixedOrder(Order(1000, 16, 4, seed), lengths, 1000)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.9])
def test_shares_hold_from_the_first_batches_on(share):
    lengths = Lengths((Stage({4: share, 2: 1 - share}),))
    for n in (20, 64, 1000):
        assert abs((lengths.of(0, n) == 4).mean() - share) < 3 / n + 0.01


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_later_start_gives_the_rest_of_the_same_lengths(first, more):
    assert (GROWING.of(first, first + more) == GROWING.of(0, first + more)[first:]).all()
    assert sum(GROWING.counts(first).values()) == first


def test_a_stage_ends_and_the_next_begins():
    assert set(GROWING.of(0, 10).tolist()) == {8, 2} and set(GROWING.of(10, 60).tolist()) == {16, 2}


def test_every_batch_has_as_many_tokens_and_is_the_same_on_all_ranks():
    whole = [(len(rows), rows.length, list(rows), rows.batch) for rows in EpochBatches(mixed())]
    assert {n * length for n, length, *_ in whole} == {64} and {length for _, length, *_ in whole} == {16, 8, 2}
    ranks = [list(EpochBatches(mixed(), rank, 2)) for rank in range(2)]
    assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == [offsets for *_, offsets, _ in whole]
    assert [rows.first for rows in ranks[1]] == [n // 2 for n, *_ in whole]


@pytest.mark.parametrize("start", [0, 7, 15, 16, 40])
def test_a_resumed_run_gets_the_batches_of_the_uninterrupted_one(start):
    endless = list(mixed().batches(0, 60))
    late = list(mixed().batches(start, 60))
    assert [(n, a.tolist()) for n, a in late] == [(n, a.tolist()) for n, a in endless[start:]]


def test_windows_of_one_length_do_not_overlap_within_their_epoch():
    seen = Counter()
    order = mixed(lengths=Lengths((Stage({16: 0.5, 8: 0.5}),)))
    for length, offsets in order.batches(0, 20):
        if length == 8:
            seen.update(((offsets[:, None] + np.arange(8)) % 1000).ravel().tolist())
    assert max(seen.values()) == 1


REFUSED = [
    ([], "data.lengths"),
    ([{"shares": {8: 0.6, 2: 0.3}}], "data.lengths.0.shares"),
    ([{"shares": {32: 1.0}}], "data.lengths"),
    ([{"shares": {7: 1.0}}], "data.lengths"),
    ([{"shares": {1: 1.0}}], "data.lengths.0.shares"),
    ([{"shares": {8: -1}}], "data.lengths.0.shares.8"),
    ([{"share": {8: 1.0}}], "data.lengths.0.share"),
    ([{"shares": {8: 1.0}, "steps": 3}], "data.lengths.0.steps"),
    ([{"shares": {8: 1.0}, "batches": 3}], "data.lengths.0.batches"),
    ([{"shares": {8: 1.0}}, {"shares": {8: 1.0}}], "data.lengths.0.batches"),
    ([{"shares": {8: 1.0}, "batches": 0}, {"shares": {8: 1.0}}], "data.lengths.0.batches"),
]


@pytest.mark.parametrize(("value", "path"), REFUSED)
def test_stages_that_cannot_be_are_refused(value, path):
    with pytest.raises(ConfigError) as caught:
        read_lengths(value, 16, 4)
    assert caught.value.path == path


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
