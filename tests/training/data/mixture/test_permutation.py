"""The Feistel permutation is a permutation for every length and key, and the same everywhere."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.training.data.mixture.permutation import draw, permuted

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
