"""Windows of several lengths: shares of the tokens, growing stages, the same after resuming and on every rank."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwright.registry import ConfigError
from blockwright.training.data.lengths import Lengths, Stage, read
from blockwright.training.data.order import EpochBatches, MixedOrder, Order

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
        read(value, 16, 4)
    assert caught.value.path == path
