"""The search behind matching, against trying every number."""

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockwright.lab.match.search import UnmovedError, nearest

WIDTHS = (64, 32, 16, 8, 4, 2, 1)
TOP = 3000  # numbers above are not tried by the brute force, and goals lie below what is measured there


def brute_force(figures, goal, multiples, tol):
    """The coarsest multiple that reaches the goal, else the finest; and how far off the nearest of its numbers is."""
    for multiple in multiples:
        off = min((abs(f - goal) for v, f in figures.items() if v % multiple == 0), default=math.inf)
        if off <= tol * goal:
            break
    return multiple, off


@example(power=1.0, slope=1.0, floor=0.0, start=641, wanted=642.0, tol=0.0, multiples=(64, 16))
@example(power=1.0, slope=1.0, floor=0.0, start=639, wanted=638.0, tol=0.0, multiples=(64, 16))
@settings(max_examples=80, deadline=None)
@given(
    power=st.sampled_from([0.5, 1.0, 1.3, 2.0, 3.0]),
    slope=st.floats(0.01, 1e6),
    floor=st.floats(0, 1e9),
    start=st.integers(1, 2000),
    wanted=st.floats(0.3, 2500.0),
    tol=st.sampled_from([0.0, 1e-4, 0.005, 0.1]),
    multiples=st.sampled_from([WIDTHS, (8, 4, 2, 1), (1,), (64, 16)]),
)
def test_search_finds_what_trying_every_number_finds(power, slope, floor, start, wanted, tol, multiples):
    def figure(value):
        return floor + slope * value**power

    goal = figure(wanted)
    found = nearest(figure, start, figure(start), goal, multiples, tol)
    multiple, off = brute_force({v: figure(v) for v in range(1, TOP)}, goal, multiples, tol)
    assert found.multiple == multiple
    assert found.value % multiple == 0 and abs(found.figure - goal) == pytest.approx(off, rel=1e-9, abs=1e-9 * goal)
    assert found.figure == figure(found.value)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.floats(0.1, 100), min_size=100, max_size=100), start=st.integers(1, 99), share=st.floats(0, 1))
def test_any_growth_is_followed(steps, start, share):
    sums = [*itertools.accumulate(steps)]
    goal = sums[0] + share * (sums[-1] - sums[0])
    found = nearest(lambda v: sums[v - 1] if v <= len(sums) else None, start, sums[start - 1], goal, (1,), 0.0)
    assert abs(found.figure - goal) == min(abs(s - goal) for s in sums)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(1, 60), wanted=st.integers(20, 2000), heads=st.sampled_from([6, 10, 14, 20, 48]))
def test_numbers_that_cannot_be_built_are_passed_over(start, wanted, heads):

    def figure(value):
        return float(value * value) if value % heads == 0 else None

    found = nearest(figure, start * heads, float(start * heads) ** 2, float(wanted * wanted), WIDTHS, 0.0)
    buildable = list(range(heads, TOP, heads))
    assert abs(found.figure - wanted**2) == min(abs(v * v - wanted**2) for v in buildable)


def test_search_takes_few_measurements():
    tried = []

    def figure(value):
        tried.append(value)
        return 7e9 + 3 * 2048 * 27 * value

    found = nearest(figure, 10944, 7e9 + 3 * 2048 * 27 * 10944, 7e9 + 3 * 2048 * 27 * 5000, WIDTHS, 0.005)
    assert found.value == 4992 and found.multiple == 64
    assert len(tried) == found.measured == len(set(tried)) <= 4


def test_finer_multiples_cost_one_or_two_measurements_each():
    def figure(value):
        return 1000.0 * value

    assert nearest(figure, 640, figure(640), 1_234_567.0, WIDTHS, 0.0).measured <= 6 + 2 * len(WIDTHS)


@pytest.mark.parametrize("goal", [1.0, 50.0])
def test_a_figure_that_never_moves_is_told(goal):
    with pytest.raises(UnmovedError):
        nearest(lambda value: 7.0, 512, 7.0, goal, WIDTHS, 0.001)


def test_a_limit_above_is_found():
    limit = 100_003
    found = nearest(lambda value: float(value) if value <= limit else None, 64, 64.0, 1e9, WIDTHS, 0.001)
    assert found.value == limit


def test_nothing_larger_than_the_largest_is_tried():
    tried = []
    found = nearest(lambda value: tried.append(value) or float(value), 4, 4.0, 1e9, (1,), 0.001, largest=1000)
    assert found.value == 1000 == max(tried)


@pytest.mark.parametrize(("tol", "value"), [(0.05, 768), (0.011, 768), (0.008, 784), (0.002, 776), (0.0, 777)])
def test_coarse_multiple_that_is_near_enough_is_kept(tol, value):
    assert nearest(lambda v: 100.0 + v, 500, 600.0, 100.0 + 777, WIDTHS, tol).value == value
