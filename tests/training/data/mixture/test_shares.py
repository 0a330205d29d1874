"""The schedule of a mixture against a reference that counts row by row, and its closed forms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.training.data.mixture.shares import MOST_ROWS, ONE, Schedule, Stage

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


def test_a_batch_has_its_share_to_within_a_row_and_a_half():
    stage = Stage({"web": 70, "code": 30})
    of_batches = (stage.of(np.arange(256 * 200))[0] == stage.names.index("code")).reshape(200, 256).sum(1)
    assert of_batches.min() >= 76 and of_batches.max() <= 78


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
