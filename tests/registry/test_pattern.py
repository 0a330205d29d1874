"""Patterns and selectors: what they promise, and what is refused."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickest import takes_less

from blockwright.registry.errors import ConfigError
from blockwright.registry.layout import MAX_LAYERS
from blockwright.registry.pattern import expand, select

PATH = "model.layout.ffn"


def refusal(call: Any, *given: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call(*given, PATH)
    assert caught.value.path == PATH and caught.value.remedy
    return caught.value


SPELT: list[tuple[Any, int, str]] = [
    ("a", 3, "aaa"), ("a b", 4, "abab"), ("a*3 b", 8, "aaabaaab"), ("3*a b", 4, "aaab"), ("a 2*b", 3, "abb"),
    ("a *2, b", 3, "aab"), (" a,b\n", 2, "ab"), ("a*", 3, "aaa"), ("a*1 b*", 4, "abbb"), ("a* b", 4, "aaab"),
    ("a b* c", 2, "ac"), ("(a b)*2 c", 5, "ababc"), ("2*(a b) c", 5, "ababc"), ("(a*2 b)*2 c*", 8, "aabaabcc"),
    ("a (b*3 c)* c", 10, "abbbcbbbcc"), ("((a b)*2 c)*", 10, "ababcababc"), ("(a)* b", 1, "b"),
    ("(" * 16 + "a" + ")" * 16, 2, "aa"), (["a*3", "b"], 4, "aaab"), (["a", "(b c)*"], 5, "abcbc"),
    (("a", "b", "b"), 3, "abb"),
]  # fmt: skip


def test_pattern_spells_one_name_a_layer() -> None:
    wrong = [row for row in SPELT if "".join(expand(*row[:2], PATH)) != row[2]]
    assert not wrong
    explicit = [f"a_rather_long_block_name_{i}" for i in range(MAX_LAYERS)]
    assert expand(explicit, MAX_LAYERS, PATH) == explicit


BAD: list[Any] = [
    "", [], [""], None, 7, {"a": 1}, ["a", True], ["a", ["b"]], "L L F", "a^3", "a b:3", "a*-1", "a*b", "a*3b",
    "a*٣",  # an Arabic-Indic digit
    "a* * b", "* a", "a*2*3", "2*a*", "3*", "()", "(a b", ["(a", "b)"], "a) b", "a*0 b", "a*5", "a* b*", "(a* b)*",
    "(a*)", "(" * 17 + "a" + ")" * 17,
]  # fmt: skip


def test_bad_pattern_is_refused_with_its_path_and_the_depth() -> None:
    for pattern in BAD:
        error = refusal(expand, pattern, 4)
        assert error.value == pattern and "n_layers = 4" in error.rule, pattern
    assert len(refusal(expand, "a" * 1000, 4).value) < 70  # an error fits on a screen


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("a*3 b*2", "Take 1 off"),
        ("a*4 b c*", "Take 1 off"),
        ("a b c", "n_layers to 3 or 6"),
        ("(a b)* c", "n_layers to 3 or 5"),
        ("(a b)* c*4", "n_layers to 6"),
    ],
)
def test_pattern_of_another_length_is_refused_with_the_numbers_that_fit(pattern: str, remedy: str) -> None:
    assert remedy in refusal(expand, pattern, 4).remedy


def test_absurd_pattern_is_refused_before_anything_big_is_made() -> None:
    absurd: list[Any] = ["a*1000000000", "((a*1000)*1000)*1000", "(" * 15 + "a" + "*9999)" * 15 + "*9999"]
    absurd += ["a*" + "9" * 5000, "a " * 30_000, "(" * 30_000, "a* " * 5_000, ["a"] * 30_000]
    for pattern in absurd:
        assert takes_less(2, lambda pattern=pattern: refusal(expand, pattern, MAX_LAYERS)), pattern[:24]
    tracemalloc.start()
    for pattern in absurd:
        refusal(expand, pattern, MAX_LAYERS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


word = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)


@st.composite
def spelling(draw: st.DrawFn, nesting: int = 2) -> tuple[str, list[str]]:
    """A valid pattern without filler, and what it must spell."""
    parts, spelt = [], []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(word)
        text, unit = name, [name]
        if nesting and draw(st.booleans()):
            inner, unit = draw(spelling(nesting=nesting - 1))
            text = f"({inner})"
        times = draw(st.integers(1, 3))
        parts.append(draw(st.sampled_from([f"{text}*{times}", f"{times}*{text}"] + [text] * (times == 1))))
        spelt += unit * times
    return draw(st.sampled_from([" ", ", ", "\n"])).join(parts), spelt


Spelling = tuple[str, list[str]]


@settings(max_examples=25)
@given(spelling(), word, spelling(), st.integers(0, 9), st.integers(1, 4))
def test_pattern_tiles_the_depth_and_fill_keeps_its_ends(
    head: Spelling, name: str, tail: Spelling, room: int, tiles: int
) -> None:
    (text, spelt), depth = head, tiles * len(head[1])
    assert expand(text, depth, PATH) == spelt * tiles == expand(f"({text})*{tiles}", depth, PATH)
    assert expand(f"({text})*", depth, PATH) == spelt * tiles
    n_layers = len(spelt) + room + len(tail[1])
    assert expand(f"{text} {name}* {tail[0]}", n_layers, PATH) == spelt + [name] * room + tail[1]
    group, size = f"{text} ({tail[0]})*", len(tail[1])
    if (room and room % size == 0) or size == 1:
        assert expand(group, len(spelt) + room, PATH) == spelt + tail[1] * (room // size)
    else:
        assert "n_layers" in str(refusal(expand, group, len(spelt) + room))


@settings(max_examples=100)
@given(st.text() | st.text("ab_*()0123, ", max_size=30) | st.lists(st.text("ab*()2 ", max_size=8)), st.integers(1, 60))
def test_any_text_spells_the_depth_or_is_refused(pattern: str | list[str], n_layers: int) -> None:
    try:
        spelt = expand(pattern, n_layers, PATH)
    except ConfigError as error:
        assert error.path == PATH and f"n_layers = {n_layers}" in error.rule and error.remedy
    else:
        written = " ".join(pattern) if isinstance(pattern, list) else pattern
        assert len(spelt) == n_layers and set(spelt) <= set(re.findall("[a-z][a-z0-9_]*", written))


SELECTED: list[tuple[Any, list[int]]] = [
    (0, [0]), (-1, [7]), (-8, [0]), ("0..1", [0, 1]), ("3 .. 3", [3]), ("-2..-1", [6, 7]), ("6..-1", [6, 7]),
    ("-8..7", list(range(8))), ([5, "0..2", -1, 1, 7], [0, 1, 2, 5, 7]), ((1,), [1]),
]  # fmt: skip
SELECTS_NONE: list[Any] = [
    8, -9, 64, "0..8", "5..4", "-1..0", "1:4", [0, "0:2"], "3", "", "2..", "0.." + "9" * 5000, "-" + "9" * 5000 + "..0",
    True, [False], 1.0, None, [[0]], {0: 1}, [],
]  # fmt: skip


def test_selector_names_layers_in_order_and_once_or_is_refused() -> None:
    assert not [row for row in SELECTED if select(row[0], 8, PATH) != row[1]]
    for selector in SELECTS_NONE:
        error = refusal(select, selector, 8)
        assert error.value is selector and "n_layers = 8" in error.rule, selector


index = st.integers(-12, 12)
ends = st.tuples(index, index).map(lambda pair: f"{pair[0]}..{pair[1]}")


@given(index | ends | st.text() | st.lists(index | ends, max_size=4), st.integers(1, 12))
def test_selection_is_within_range_sorted_and_unique_or_refused(selector: Any, n_layers: int) -> None:
    try:
        layers = select(selector, n_layers, PATH)
    except ConfigError as error:
        assert error.path == PATH and error.remedy
    else:
        assert layers and layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < n_layers
