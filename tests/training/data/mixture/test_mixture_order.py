"""The order of a mixture's windows: every epoch serves each window once, and arms read a source in the same order."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.training.data.mixture.order import MixtureOrder
from blockwright.training.data.mixture.shares import Schedule, Stage
from blockwright.training.data.order import EpochBatches

T = 8
TWO = (Stage({"big": 70, "small": 30}, 20), Stage({"big": 10, "small": 90}))


def order(stages=TWO, n_tokens=(1003, 211), seed=0, n_batches=60, batch_size=6) -> MixtureOrder:
    return MixtureOrder(Schedule(stages, batch_size), n_tokens, T, seed, n_batches)


def windows(mixture: MixtureOrder, name: str, n_batches: int) -> list[int]:
    """First tokens of a source's windows, in the order of its rows in the schedule."""
    k, first = mixture.schedule.names.index(name), []
    for number in range(n_batches):
        source, _ = mixture.schedule.of(number)
        addresses = mixture.batch(number)
        own = addresses[(addresses >= mixture.bases[k]) & (addresses < mixture.bases[k] + mixture.n_tokens[k])]
        assert len(own) == (source == k).sum()
        first.append(sorted((own - mixture.bases[k]).tolist()))
    return [*chain(*first)]


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 3), st.integers(200, 900))
def test_every_epoch_serves_each_window_of_a_source_once(seed, n_tokens):
    mixture = order((Stage({"only": 1}),), (n_tokens,), seed, batch_size=1)
    n = n_tokens // T
    for epoch in range(3):
        begins = np.concatenate([mixture.batch(number) for number in range(epoch * n, (epoch + 1) * n)])
        covered = (begins[:, None] + np.arange(T)) % n_tokens
        assert len(np.unique(covered)) == n * T


def test_no_window_is_lost_or_repeated_where_the_shares_change():
    mixture = order(n_tokens=(4003, 2011))
    for name in ("big", "small"):
        served = windows(mixture, name, 40)
        in_first = mixture.windows[mixture.schedule.names.index(name)]
        assert len(set(served[:in_first])) == min(len(served), in_first)


def test_arms_with_other_shares_read_a_source_in_the_same_order():
    def ordered(stages) -> list[int]:
        mixture = MixtureOrder(Schedule(stages, 1), (1003, 211), T, 0, 250)
        addresses = [int(mixture.batch(number)[0]) for number in range(250)]
        return [address for address in addresses if address < 1003]

    one, other = ordered(TWO), ordered((Stage({"big": 1, "small": 1}),))
    n = min(len(one), len(other))
    assert n > 30 and one[:n] == other[:n]


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_the_same_for_every_world_size_and_start(world_size):
    mixture = order()
    whole = [mixture.batch(number).tolist() for number in range(60)]
    for start in (0, 20, 59) if world_size == 1 else (19,):
        ranks = [EpochBatches(mixture, rank, world_size, start=start) for rank in range(world_size)]
        assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == whole[start:]


def test_a_stage_to_come_does_not_change_the_past():
    other = order((TWO[0], Stage({"small": 1})))
    assert all((order().batch(number) == other.batch(number)).all() for number in range(20))
    assert any((order().batch(number) != other.batch(number)).any() for number in range(20, 30))


def test_rows_of_a_batch_are_permuted():
    mixture = order((Stage({"big": 1, "small": 1}),), batch_size=64)
    first_half = [(mixture.batch(number)[:32] < 1003).sum() for number in range(10)]
    assert all(8 < n < 24 for n in first_half) and len(set(first_half)) > 1


def test_epochs_and_seeds_differ_and_the_order_is_the_same_on_every_machine():
    mixture = order()
    assert (mixture.batch(3) != order(seed=1).batch(3)).any()
    assert mixture.batch(3).tolist() == [978, 1056, 1008, 610, 298, 858]
    assert mixture.epochs(20) == {"big": 84 / 125, "small": 36 / 26}
