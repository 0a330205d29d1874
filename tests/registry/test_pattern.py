"""Patterns and selectors: what they promise, and how each refusal reads."""

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


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "n_layers", "spelt"),
    [
        ("a", 3, "aaa"),
        ("a b", 4, "abab"),
        ("a*3 b", 8, "aaabaaab"),
        ("3*a b", 4, "aaab"),
        ("a 2*b", 3, "abb"),
        ("a *2, b", 3, "aab"),
        (" a,b\n", 2, "ab"),
        ("a*", 3, "aaa"),
        ("a*1 b*", 4, "abbb"),
        ("a* b", 4, "aaab"),
        ("a b* c", 2, "ac"),
        ("(a b)*2 c", 5, "ababc"),
        ("2*(a b) c", 5, "ababc"),
        ("(a*2 b)*2 c*", 8, "aabaabcc"),
        ("a (b*3 c)* c", 10, "abbbcbbbcc"),
        ("((a b)*2 c)*", 10, "ababcababc"),
        ("(a)* b", 1, "b"),
        ("(" * 16 + "a" + ")" * 16, 2, "aa"),
        (["a*3", "b"], 4, "aaab"),
        (["a", "(b c)*"], 5, "abcbc"),
        (("a", "b", "b"), 3, "abb"),
    ],
)
def test_pattern_spells_one_name_a_layer(pattern: Any, n_layers: int, spelt: str) -> None:
    assert "".join(expand(pattern, n_layers, PATH)) == spelt


@pytest.mark.parametrize(
    ("pattern", "n_layers", "why", "remedy"),
    [
        ("", 4, "nothing is where a name is expected", "Write name"),
        ([], 4, "a list of texts", "[linear, full]"),
        ([""], 4, "nothing is", "Write name"),
        (None, 4, "a list of texts", "'linear*3 full'"),
        (7, 4, "a list of texts", "'linear*3 full'"),
        ({"a": 1}, 4, "a list of texts", "'linear*3 full'"),
        (["a", True], 4, "a list of texts", "quote a name"),
        (["a", ["b"]], 4, "a list of texts", "'linear*3 full'"),
        ("L L F", 4, "'L L F' cannot be read", "lower case"),
        ("a^3", 4, "'^3' cannot be read", "'linear*3 full'"),
        ("a b:3", 4, "':3' cannot be read", "'linear*3 full'"),
        ("a*-1", 4, "'*-1' cannot be read", "'linear*3 full'"),
        ("a*b", 4, "'*b' cannot be read", "apart from each other"),
        ("a*3b", 4, "'*3b' cannot be read", "apart from each other"),
        ("a*٣", 4, "cannot be read", "'linear*3 full'"),  # an Arabic-Indic digit
        ("a* * b", 4, "'*' is where a name is expected", "name*3"),
        ("* a", 4, "'*' is where a name is expected", "name*3"),
        ("a*2*3", 4, "'3' is where a name is expected", "(a b)*3"),
        ("2*a*", 4, "'*' is where a name is expected", "name*"),
        ("3*", 4, "nothing is where a name is expected", "name*3"),
        ("()", 4, "')' is where a name is expected", "(a b)*3"),
        ("(a b", 4, "'(' is never closed", "')'"),
        (["(a", "b)"], 4, "'(' is never closed", "')'"),
        ("a) b", 4, "')' closes nothing", "'('"),
        ("a*0 b", 4, "repeated 0 times", "1 to 4"),
        ("a*5", 4, "repeated 5 times", "bare *"),
        ("a*3 b*2", 4, "names 5", "Take 1 off"),
        ("a*4 b c*", 4, "names 5", "Take 1 off"),
        ("a b c", 4, "3 at a time cannot fill 4", "n_layers to 3 or 6"),
        ("(a b)* c", 4, "2 at a time cannot fill 3", "n_layers to 3 or 5"),
        ("(a b)* c*4", 4, "2 at a time cannot fill 0", "n_layers to 6"),
        ("a* b*", 4, "only one part can fill", "name*3"),
        ("(a* b)*", 4, "no room of its own", "a count"),
        ("(a*)", 4, "no room of its own", "a count"),
        ("(" * 17 + "a" + ")" * 17, 4, "at most 16 deep", "parentheses"),
        ("a" * 1000, 4, "at most 700 characters", "Repeat"),
    ],
)
def test_bad_pattern_is_refused_with_path_depth_and_remedy(pattern: Any, n_layers: int, why: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(pattern, n_layers, PATH)
    assert caught.value.path == PATH
    assert why in caught.value.rule and f"n_layers = {n_layers}" in caught.value.rule
    assert remedy in caught.value.remedy
    assert caught.value.value == (pattern if pattern != "a" * 1000 else "a" * 60 + "...")  # an error fits on a screen


@pytest.mark.parametrize(
    "pattern",
    [
        "a*1000000000",
        "((a*1000)*1000)*1000",
        "(" * 15 + "a" + "*9999)" * 15 + "*9999",
        "a*" + "9" * 5000,
        "a " * 30_000,
        "(" * 30_000,
        "a* " * 5_000,
        ["a"] * 30_000,
    ],
    ids=lambda pattern: str(pattern)[:24],
)
def test_absurd_pattern_is_refused_before_anything_big_is_made(pattern: Any) -> None:
    def refuse() -> None:
        with pytest.raises(ConfigError):
            expand(pattern, MAX_LAYERS, PATH)

    assert takes_less(2, refuse)
    tracemalloc.start()
    refuse()
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


@settings(max_examples=25)
@given(spelling(), st.integers(1, 4))
def test_pattern_tiles_the_depth_with_exactly_its_names(pattern: tuple[str, list[str]], tiles: int) -> None:
    text, spelt = pattern
    depth = tiles * len(spelt)
    assert expand(text, depth, PATH) == spelt * tiles == expand(f"({text})*{tiles}", depth, PATH)
    assert expand(f"({text})*", depth, PATH) == spelt * tiles


@settings(max_examples=25)
@given(spelling(), word, spelling(), st.integers(0, 9))
def test_fill_keeps_its_head_and_tail_at_the_ends(
    head: tuple[str, list[str]], name: str, tail: tuple[str, list[str]], room: int
) -> None:
    n_layers = len(head[1]) + room + len(tail[1])
    assert expand(f"{head[0]} {name}* {tail[0]}", n_layers, PATH) == head[1] + [name] * room + tail[1]


@settings(max_examples=25)
@given(spelling(), spelling(), st.integers(0, 40))
def test_group_filler_is_whole_or_refused(head: tuple[str, list[str]], group: tuple[str, list[str]], room: int) -> None:
    text, n_layers, size = f"{head[0]} ({group[0]})*", len(head[1]) + room, len(group[1])
    if (room and room % size == 0) or size == 1:
        assert expand(text, n_layers, PATH) == head[1] + group[1] * (room // size)
    else:
        with pytest.raises(ConfigError, match="n_layers"):
            expand(text, n_layers, PATH)


@settings(max_examples=25)
@given(st.lists(word, min_size=1, max_size=50))
def test_list_with_a_name_for_each_layer_is_taken_as_is(explicit: list[str]) -> None:
    assert expand(explicit, len(explicit), PATH) == explicit


def test_deepest_explicit_list_is_taken_as_is() -> None:
    explicit = [f"a_rather_long_block_name_{i}" for i in range(MAX_LAYERS)]
    assert expand(explicit, MAX_LAYERS, PATH) == explicit


@settings(max_examples=100)
@given(st.text() | st.text("ab_*()0123, ", max_size=30) | st.lists(st.text("ab*()2 ", max_size=8)), st.integers(1, 60))
def test_any_text_spells_the_depth_or_is_refused(pattern: str | list[str], n_layers: int) -> None:
    try:
        spelt = expand(pattern, n_layers, PATH)
    except ConfigError as error:
        assert error.path == PATH and f"n_layers = {n_layers}" in error.rule and error.remedy
    else:
        assert len(spelt) == n_layers and set(spelt) <= set(
            re.findall("[a-z][a-z0-9_]*", " ".join(pattern) if isinstance(pattern, list) else pattern)
        )


# --- selectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        (0, [0]),
        (-1, [7]),
        (-8, [0]),
        ("0..1", [0, 1]),
        ("3 .. 3", [3]),
        ("-2..-1", [6, 7]),
        ("6..-1", [6, 7]),
        ("-8..7", list(range(8))),
        ([5, "0..2", -1, 1, 7], [0, 1, 2, 5, 7]),
        ((1,), [1]),
    ],
)
def test_selector_names_layers_in_order_and_once(selector: Any, layers: list[int]) -> None:
    assert select(selector, 8, PATH) == layers


@pytest.mark.parametrize(
    ("selector", "why", "remedy"),
    [
        (8, "8 is not one of them", "0 to 7"),
        (-9, "-9 is not one of them", "-1 for the last"),
        (64, "64 is not one of them", "YAML reads 1:4 as the number 64"),
        ("0..8", "8 is not one of them", "0 to 7"),
        ("5..4", "backwards, from 5 to 4", "4..5"),
        ("-1..0", "backwards, from 7 to 0", "0..7"),
        ("1:4", "'1:4' selects none", "Write a..b"),
        ([0, "0:2"], "'0:2' selects none", "Write a..b"),
        ("3", "'3' selects none", "a layer, 3"),
        ("", "selects none", "a list of these"),
        ("2..", "'2..' selects none", "both ends"),
        ("0.." + "9" * 5000, "selects none", "both ends"),
        ("-" + "9" * 5000 + "..0", "selects none", "both ends"),
        (True, "True selects none", "a layer, 3"),
        ([False], "False selects none", "a layer, 3"),
        (1.0, "1.0 selects none", "a layer, 3"),
        (None, "None selects none", "a layer, 3"),
        ([[0]], "[0] selects none", "a list of these"),
        ({0: 1}, "selects none", "a list of these"),
        ([], "an empty list selects none", "Name a layer"),
    ],
)
def test_bad_selector_is_refused_with_path_depth_and_remedy(selector: Any, why: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select(selector, 8, "model.overrides.0.layers")
    assert caught.value.path == "model.overrides.0.layers" and caught.value.value is selector
    assert why in caught.value.rule and "n_layers = 8" in caught.value.rule
    assert remedy in caught.value.remedy


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
