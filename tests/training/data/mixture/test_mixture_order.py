"""The order of a mixture's windows, its schedule, and the permutation that both are made of."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.training.data.mixture.order import MOST_ROWS, ONE, MixtureOrder, Schedule, Stage, draw, permuted
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


weights = st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 2**31), min_size=1)
stages = st.builds(
    lambda parts, last: (*(Stage(w, n) for w, n in parts), Stage(last)),
    st.lists(st.tuples(weights, st.integers(1, 12)), max_size=3),
    weights,
)
schedules = st.builds(Schedule, stages, st.integers(1, 9))


def row_by_row(stage: Stage, n: int) -> list[tuple[str, int]]:
    """The source of each row and its rows before, with fractions in place of fixed point, counted one by one."""
    names, seen, rows = stage.names, dict.fromkeys(stage.names, 0), []
    for row in range(n):
        i, k = row, len(names) - 1
        while k:
            p = Fraction(stage.roundings[k - 1], ONE)
            below, above = int(i * p + Fraction(1, 2)), int((i + 1) * p + Fraction(1, 2))
            if below == above:
                break
            i, k = below, k - 1
        rows.append((names[k], seen[names[k]]))
        seen[names[k]] += 1
    return rows


@settings(max_examples=40)
@given(weights, st.integers(1, 300))
def test_a_stage_is_the_chain_counted_row_by_row(mixture, n):
    stage = Stage(mixture)
    source, before = stage.of(np.arange(n))
    slow = row_by_row(stage, n)
    assert [(stage.names[k], i) for k, i in zip(source.tolist(), before.tolist(), strict=True)] == slow
    assert stage.counts(n) == [sum(name == each for name, _ in slow) for each in stage.names]


@settings(max_examples=40)
@given(weights, st.integers(0, MOST_ROWS - 200))
def test_counts_agree_with_the_rows_anywhere(mixture, first):
    stage = Stage(mixture)
    source, before = stage.of(np.arange(first, first + 200))
    counts = np.array(stage.counts(first))
    for k in range(len(stage.names)):
        assert before[source == k].tolist() == list(range(counts[k], counts[k] + int((source == k).sum())))
    assert (np.bincount(source, minlength=len(counts)) + counts).tolist() == stage.counts(first + 200)


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.15, 0.04, 0.00999, 0.00001), (0.34, 0.33, 0.33), (0.999, 0.001)])
def test_every_prefix_has_its_shares_to_about_a_row(shares):
    stage, n = Stage({str(k): round(share * ONE) for k, share in enumerate(shares)}), 200_000
    source, _ = stage.of(np.arange(n))
    for k, share in enumerate(shares):
        assert np.abs(np.cumsum(source == k) - share * np.arange(1, n + 1)).max() < 1.6


@settings(max_examples=40)
@given(schedules, st.integers(0, 40), st.integers(1, 6))
def test_stages_continue_every_source_where_the_last_one_ended(schedule, first, n):
    walked = dict.fromkeys(schedule.names, 0)
    for batch in range(first + n):
        if batch == first:
            assert schedule.counts(first) == [*walked.values()]
        source, before = schedule.of(batch)
        for k, ordinal in zip(source.tolist(), before.tolist(), strict=True):
            assert ordinal == walked[schedule.names[k]]
            walked[schedule.names[k]] += 1
    assert schedule.counts(first + n) == [*walked.values()]


def test_the_order_of_the_names_has_no_meaning():
    one, other = Stage({"a": 2, "b": 1, "c": 4}), Stage({"c": 4, "a": 2, "b": 1})
    assert all((x == y).all() for x, y in zip(one.of(np.arange(500)), other.of(np.arange(500)), strict=True))


def test_the_prefix_is_of_the_past_alone():
    past, late = Stage({"a": 1, "b": 2}, 10), Stage({"a": 1})
    one = Schedule((past, late), 4)
    for other in (Schedule((past, Stage({"c": 1}, 5), late), 4), Schedule((Stage({"a": 1, "b": 2}),), 4)):
        assert one.prefix(10) == other.prefix(10) and one.prefix(11) != other.prefix(11)
        for batch in range(10):
            source, before = one.of(batch)
            same_source, same_before = other.of(batch)
            assert [one.names[k] for k in source] == [other.names[k] for k in same_source]
            assert (before == same_before).all()
    assert one.prefix(3) != Schedule((Stage({"a": 2, "b": 1}, 10), late), 4).prefix(3)
    assert one.prefix(3) != Schedule((past, late), 5).prefix(3)


def test_the_number_of_the_stage():
    schedule = Schedule((Stage({"a": 1}, 3), Stage({"b": 1}, 2), Stage({"a": 1})), 4)
    assert [schedule.stage(batch) for batch in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]


keys = st.integers(0, 2**64 - 1)


@settings(max_examples=40)
@given(st.integers(1, 700), keys)
def test_every_place_goes_to_another(n, key):
    assert sorted(permuted(np.arange(n), n, key).tolist()) == list(range(n))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 2**53), keys), min_size=1, max_size=20), st.data())
def test_rows_of_different_lengths_and_keys_are_those_of_each_alone(pairs, data):
    places = [data.draw(st.integers(0, n - 1)) for n, _ in pairs]
    lengths, key = np.array([n for n, _ in pairs]), np.array([key for _, key in pairs], dtype=np.uint64)
    together = permuted(places, lengths, key)
    assert (together < lengths).all()
    assert together.tolist() == [int(permuted(at, n, k)) for at, (n, k) in zip(places, pairs, strict=True)]


def test_it_is_the_same_on_every_machine_and_in_every_release():
    assert permuted(np.arange(10), 10, 7).tolist() == [3, 4, 1, 5, 7, 9, 2, 0, 6, 8]
    assert int(permuted(10**12, 10**13, 2**64 - 1)) == 2751320580699
    assert draw(7, "web", 3) == (11322797495494031106, 2382887407846473268)


def test_neighbours_go_far_apart_and_keys_differ():
    n = 100_000
    one, other = permuted(np.arange(n), n, 1), permuted(np.arange(n), n, 2)
    steps = np.abs(np.diff(one))
    assert abs(steps.mean() / (n / 3) - 1) < 0.02  # as of independent draws
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02 and abs(np.corrcoef(one, np.arange(n))[0, 1]) < 0.02
    assert (one == other).mean() < 1e-3
