"""Layers are grouped, and each group has its counterpart: known layouts, and rules that hold for any."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from blockwright.lab.difference.counterparts import Group, aligned, grouped, likeness, spelt
from blockwright.lab.difference.entries import ABSENT, Entry, alike, compared

DENSE, MOE, WIDE = (
    {"ffn": "swiglu", "ffn.d_ff": 8},
    {"ffn": "moe", "ffn.n_experts": 4},
    {"ffn": "swiglu", "ffn.d_ff": 16},
)
LOCAL, GLOBAL = {"a": "sliding", "a.window": 4096, "a.heads": 4}, {"a": "sliding", "a.window": None, "a.heads": 4}


def layers(*groups: Group | None) -> list[tuple[int, ...]]:
    return [group.layers if group else () for group in groups]


def test_alike_layers_are_a_group_wherever_they_are() -> None:
    assert [g.layers for g in grouped([DENSE, MOE, DENSE, MOE])] == [(0, 2), (1, 3)]


def test_dense_layers_are_next_to_dense_ones_and_experts_next_to_experts() -> None:
    pairs = aligned("ffn", grouped([DENSE, MOE, MOE]), grouped([MOE, WIDE, WIDE]))
    assert [layers(p.a, p.b) for p in pairs] == [[(0,), (1, 2)], [(1, 2), (0,)]]
    assert [p.same for p in pairs] == [False, True]


def test_window_is_next_to_another_window() -> None:
    other = {**LOCAL, "a.window": 512}
    pairs = aligned("attention", grouped([LOCAL, GLOBAL]), grouped([GLOBAL, other]))
    assert [layers(p.a, p.b) for p in pairs] == [[(0,), (1,)], [(1,), (0,)]]
    pairs = aligned("attention", grouped([GLOBAL, LOCAL]), grouped([other]))
    assert [layers(p.a, p.b) for p in pairs] == [[(0,), ()], [(1,), (0,)]]


def test_group_without_counterpart_is_in_one_model_alone() -> None:
    (first, second) = aligned("ffn", grouped([DENSE]), grouped([DENSE, MOE]))
    assert first.same and not second.same and second.a is None
    assert {e.a for e in second.entries} == {ABSENT}
    assert second.to_plain()["layers"] == {"b": [1]}
    assert second.to_plain()["settings"][0] == {"path": "ffn", "same": False, "b": "moe"}


of_layers = st.lists(st.sampled_from([DENSE, MOE, WIDE, LOCAL, GLOBAL]), min_size=1, max_size=8)


@given(of_layers, of_layers)
def test_every_layer_is_in_one_pair_and_no_group_is_left_beside_one(a: list[dict], b: list[dict]) -> None:
    ours, theirs = grouped(a), grouped(b)
    pairs = aligned("x", ours, theirs)
    assert sorted(i for p in pairs if p.a for i in p.a.layers) == list(range(len(a)))
    assert sorted(i for p in pairs if p.b for i in p.b.layers) == list(range(len(b)))
    assert len(pairs) == max(len(ours), len(theirs))
    equal = [p for p in pairs if p.a and p.b and p.same]
    assert len(equal) == sum(g.settings == h.settings for g, h in itertools.product(ours, theirs))


@given(of_layers, of_layers)
def test_b_to_a_is_a_to_b(a: list[dict], b: list[dict]) -> None:
    for ours, theirs in itertools.product(a, b):
        assert likeness(ours, theirs) == likeness(theirs, ours) <= likeness(ours, ours) == 1


def test_layers_are_spelt_shortly() -> None:
    def of(*indices: int) -> Group:
        return Group(indices, {})

    assert spelt(of(*range(60)), 60) == "all 60"
    assert spelt(of(0), 60) == "0"
    assert spelt(of(*range(1, 60)), 60) == "1–59"
    assert spelt(of(0, 2, 4), 6) == "0, 2, 4"
    assert spelt(of(*range(0, 42, 2)), 42) == "21 of 42: 0, …"
    assert spelt(None, 3) == "–"


def test_paths_of_b_alone_follow_their_neighbours() -> None:
    entries = compared({"x": 1, "y": 2, "z": 3}, {"first": 0, "y": 2, "new": 5, "x": 1})
    assert [e.path for e in entries] == ["first", "x", "y", "new", "z"]


def test_values_are_compared_as_yaml_means_them() -> None:
    nan = float("nan")
    assert alike(1, 1.0) and alike(nan, nan) and alike([1, nan], [1.0, nan]) and alike(ABSENT, ABSENT)
    assert not alike(1, True) and not alike(0, False) and not alike(None, ABSENT) and not alike([1], [1, 2])
    assert Entry("x", None, None).to_plain() == {"path": "x", "same": True, "a": None, "b": None}
