"""The order of windows: a pure function of seed, epoch and batch, the same for every number of processes."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.training.data.order import EpochBatches, LineBatches, Order

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
