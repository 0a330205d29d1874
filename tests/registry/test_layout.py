"""The layout language: what a pattern, a selector and a plan promise, and how each refusal reads."""

from __future__ import annotations

import copy
import re
import time
import tracemalloc
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import ConfigError
from registry.layout import MAX_LAYERS, expand, plan, select

PATH = "model.layout.ffn"
REGISTERED = {"attention": ["gqa", "mla", "linear"], "ffn": ["swiglu", "moe"]}
KINDS = list(REGISTERED)


def planned(**model: Any) -> list[dict[str, dict[str, Any]]]:
    return plan({"n_layers": 4, "attention": {"name": "gqa"}, "ffn": {"name": "moe", "top_k": 6}} | model, KINDS, names)


def names(kind: str) -> list[str]:
    return REGISTERED[kind]


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
        ("", 4, "nothing stands where a name is due", "Write name"),
        ([], 4, "a list of texts", "[linear, full]"),
        ([""], 4, "nothing stands", "Write name"),
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
        ("a* * b", 4, "'*' stands where a name is due", "name*3"),
        ("* a", 4, "'*' stands where a name is due", "name*3"),
        ("a*2*3", 4, "'3' stands where a name is due", "(a b)*3"),
        ("2*a*", 4, "'*' stands where a name is due", "name*"),
        ("3*", 4, "nothing stands where a name is due", "name*3"),
        ("()", 4, "')' stands where a name is due", "(a b)*3"),
        ("(a b", 4, "'(' is never closed", "')'"),
        (["(a", "b)"], 4, "'(' is never closed", "')'"),
        ("a) b", 4, "')' closes nothing", "'('"),
        ("a*0 b", 4, "stand 0 times", "1 to 4"),
        ("a*5", 4, "stand 5 times", "bare *"),
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
        "a " * 300_000,
        "(" * 100_000,
        "a* " * 20_000,
        ["a"] * 500_000,
    ],
    ids=lambda pattern: str(pattern)[:24],
)
def test_absurd_pattern_is_refused_before_anything_big_is_made(pattern: Any) -> None:
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ConfigError):
        expand(pattern, MAX_LAYERS, PATH)
    took, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 2 and peak < 50_000_000


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


@given(spelling(), st.integers(1, 4))
def test_pattern_tiles_the_depth_with_exactly_its_names(pattern: tuple[str, list[str]], tiles: int) -> None:
    text, spelt = pattern
    depth = tiles * len(spelt)
    assert expand(text, depth, PATH) == spelt * tiles == expand(f"({text})*{tiles}", depth, PATH)
    assert expand(f"({text})*", depth, PATH) == spelt * tiles


@given(spelling(), word, spelling(), st.integers(0, 9))
def test_fill_keeps_its_head_and_tail_at_the_ends(
    head: tuple[str, list[str]], name: str, tail: tuple[str, list[str]], room: int
) -> None:
    n_layers = len(head[1]) + room + len(tail[1])
    assert expand(f"{head[0]} {name}* {tail[0]}", n_layers, PATH) == head[1] + [name] * room + tail[1]


@given(spelling(), spelling(), st.integers(0, 40))
def test_group_filler_is_whole_or_refused(head: tuple[str, list[str]], group: tuple[str, list[str]], room: int) -> None:
    text, n_layers, size = f"{head[0]} ({group[0]})*", len(head[1]) + room, len(group[1])
    if (room and room % size == 0) or size == 1:
        assert expand(text, n_layers, PATH) == head[1] + group[1] * (room // size)
    else:
        with pytest.raises(ConfigError, match="n_layers"):
            expand(text, n_layers, PATH)


@given(st.lists(word, min_size=1, max_size=50))
def test_list_with_a_name_for_each_layer_is_taken_as_is(explicit: list[str]) -> None:
    assert expand(explicit, len(explicit), PATH) == explicit


def test_deepest_explicit_list_is_taken_as_is() -> None:
    explicit = [f"a_rather_long_block_name_{i}" for i in range(MAX_LAYERS)]
    assert expand(explicit, MAX_LAYERS, PATH) == explicit


@settings(max_examples=500, deadline=1000)
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
        (8, "8 is none of them", "0 to 7"),
        (-9, "-9 is none of them", "-1 for the last"),
        (64, "64 is none of them", "YAML reads 1:4 as the number 64"),
        ("0..8", "8 is none of them", "0 to 7"),
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


# --- plans ------------------------------------------------------------------------------------------------------------


def test_model_without_layout_has_its_own_nodes_in_every_layer() -> None:
    assert planned() == [{"attention": {"name": "gqa"}, "ffn": {"name": "moe", "top_k": 6}}] * 4


def test_bare_name_is_a_node_and_an_absent_kind_stays_absent() -> None:
    assert plan({"n_layers": 2, "ffn": "swiglu", "attention": None}, KINDS, names) == [{"ffn": {"name": "swiglu"}}] * 2


def test_nodes_come_out_as_plain_dicts() -> None:
    layers = planned(ffn=MappingProxyType({"name": "moe"}), layout={"ffn": "moe*"})
    assert all(type(layer["ffn"]) is dict and layer["ffn"] == {"name": "moe"} for layer in layers)


def test_layout_and_override_can_give_a_kind_that_the_model_lacks() -> None:
    model = {"n_layers": 2, "layout": {"ffn": "moe swiglu"}, "overrides": [{"layers": 1, "attention": "mla"}]}
    assert plan(model, KINDS, names) == [
        {"ffn": {"name": "moe"}},
        {"ffn": {"name": "swiglu"}, "attention": {"name": "mla"}},
    ]


def test_name_in_a_layout_is_a_variant_before_it_is_a_block() -> None:
    variants = {"ffn": {"dense": {"name": "swiglu", "d_ff": 7}, "swiglu": {"name": "swiglu", "d_ff": 9}}}
    layers = planned(layout={"ffn": "dense swiglu moe moe"}, variants=variants)
    assert [layer["ffn"].get("d_ff") for layer in layers] == [7, 9, None, None]


def test_name_of_the_models_own_node_brings_its_parameters() -> None:
    layers = planned(layout={"ffn": "swiglu moe*"}, overrides=[{"layers": 0, "ffn": "moe"}])
    assert [layer["ffn"] for layer in layers] == [{"name": "moe", "top_k": 6}] * 4


def test_registered_block_that_is_not_the_models_own_comes_without_parameters() -> None:
    assert planned(layout={"ffn": "swiglu*1 moe*"})[0]["ffn"] == {"name": "swiglu"}


def test_kind_in_a_pattern_means_the_models_own_node_whatever_it_is() -> None:
    layers = planned(layout={"ffn": "swiglu*1 ffn*"})
    assert layers[1]["ffn"]["top_k"] == 6 and layers[0]["ffn"] == {"name": "swiglu"}


def test_pattern_that_never_uses_the_models_own_node_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        planned(layout={"ffn": "swiglu"})
    assert refused.value.path == "model.layout.ffn" and "never uses model.ffn (moe)" in refused.value.rule


def test_variant_without_a_name_patches_the_models_own_node() -> None:
    layers = planned(layout={"ffn": "moe* few"}, variants={"ffn": {"few": {"top_k": 1, "z_loss": 0.1}, "unused": {}}})
    assert layers[-1]["ffn"] == {"name": "moe", "top_k": 1, "z_loss": 0.1} and layers[0]["ffn"]["top_k"] == 6


def test_bare_name_as_a_variant_is_a_block_and_not_another_variant() -> None:
    layers = planned(
        layout={"ffn": "dense*1 moe*"}, variants={"ffn": {"dense": "swiglu", "swiglu": {"name": "swiglu", "b": 1}}}
    )
    assert layers[0]["ffn"] == {"name": "swiglu"}


def test_overrides_apply_in_order_and_only_to_their_layers() -> None:
    layers = planned(
        variants={"attention": {"wide": {"window": 64}}},
        overrides=[
            {"layers": "0..2", "attention": {"window": 8}, "ffn": "swiglu"},
            {"layers": 1, "attention": {"name": "mla", "rank": 4}},
            {"layers": [1, 2], "attention": {"window": 9}},
            {"layers": -1, "attention": "wide"},
        ],
    )
    assert [layer["attention"] for layer in layers] == [
        {"name": "gqa", "window": 8},
        {"name": "mla", "rank": 4, "window": 9},
        {"name": "gqa", "window": 9},
        {"name": "gqa", "window": 64},
    ]
    assert [layer["ffn"]["name"] for layer in layers] == ["swiglu"] * 3 + ["moe"]


@pytest.mark.parametrize(
    ("own", "patch", "patched"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": {"x": 1, "y": {"z": 2}}}, {"a": {"y": {"w": 3}}}, {"a": {"x": 1, "y": {"z": 2, "w": 3}}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"position": "rope"}, {"position": {"theta": 5}}, {"position": {"name": "rope", "theta": 5}}),
        ({"position": {"name": "yarn", "factor": 40}}, {"position": {"name": "rope"}}, {"position": {"name": "rope"}}),
        ({"position": {"name": "yarn", "factor": 40}}, {"position": "rope"}, {"position": "rope"}),
    ],
)
def test_patch_reaches_into_children_and_a_named_child_replaces(own: Any, patch: Any, patched: Any) -> None:
    layers = planned(attention={"name": "gqa", **own}, overrides=[{"layers": 0, "attention": patch}])
    assert layers[0]["attention"] == {"name": "gqa", **patched} and layers[1]["attention"] == {"name": "gqa", **own}


parameters = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers() | st.dictionaries(word, st.integers()))
patterns = st.sampled_from([None, "moe", "swiglu moe*", "few ffn*", "moe*1 dense*", ["few", "dense*"], "(ffn few)*"])


@given(
    st.integers(1, 5).map(lambda half: 2 * half),
    parameters,
    parameters,
    patterns,
    st.lists(
        st.tuples(st.integers(-2, 1), st.sampled_from(["moe", "few", "dense", "swiglu"]) | parameters), max_size=3
    ),
)
def test_plan_leaves_its_input_alone_and_layers_share_no_node(
    n_layers: int, own: dict[str, Any], few: dict[str, Any], pattern: Any, overrides: list[tuple[int, Any]]
) -> None:
    model = {
        "n_layers": n_layers,
        "attention": "gqa",
        "ffn": {"name": "moe", **own},
        "variants": {"ffn": {"few": few, "dense": {"name": "swiglu", "deep": {"x": [1]}}}},
        "layout": {"ffn": pattern},
        "overrides": [{"layers": layers, "ffn": change} for layers, change in overrides],
    }
    before = copy.deepcopy(model)
    layers = plan(model, KINDS, names)
    assert model == before and len(layers) == n_layers
    assert all(type(node) is dict and node["name"] for layer in layers for node in layer.values())
    mutable = [id(part) for layer in layers for node in layer.values() for part in containers(node)]
    assert len(mutable) == len(set(mutable))
    assert not set(mutable) & {id(part) for part in containers(model)}


def containers(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict | list) else []) + [
        part for child in children for part in containers(child)
    ]


@given(parameters, parameters, st.integers(-4, 3))
def test_patch_keeps_every_parameter_that_it_does_not_name(own: dict[str, Any], patch: dict[str, Any], at: int) -> None:
    node = {"name": "moe", **own}
    layers = planned(ffn=node, overrides=[{"layers": at, "ffn": patch}])
    patched = layers.pop(at)["ffn"]
    assert all(layer["ffn"] == node for layer in layers)
    assert patched.keys() == node.keys() | patch.keys()
    for key, value in node.items():
        if key not in patch:
            assert patched[key] == value
        elif isinstance(value, dict) and isinstance(patch[key], dict):
            assert patched[key] == value | patch[key]
        else:
            assert patched[key] == patch[key]


MISFITS: list[tuple[dict[str, Any], str, Any, str, str]] = [
    ({"n_layers": 0}, "model.n_layers", 0, "from 1 to 10000", "how many layers"),
    ({"n_layers": 10_001}, "model.n_layers", 10_001, "from 1 to 10000", "how many layers"),
    ({"n_layers": True}, "model.n_layers", True, "an integer", "how many layers"),
    ({"n_layers": "4"}, "model.n_layers", "4", "an integer", "how many layers"),
    ({"n_layers": None}, "model.n_layers", None, "an integer", "how many layers"),
    ({"ffn": 3}, "model.ffn", 3, "a mapping", "{name: swiglu"),
    ({"ffn": ["moe"]}, "model.ffn", ["moe"], "a mapping", "{name: swiglu"),
    ({"ffn": {"top_k": 2}}, "model.ffn.name", None, "name of a block", "name: swiglu"),
    ({"ffn": {"name": 3}}, "model.ffn.name", 3, "name of a block", "name: swiglu"),
    ({"ffn": ""}, "model.ffn.name", "", "name of a block", "name: swiglu"),
    ({"layout": "moe"}, "model.layout", "moe", "a mapping", "{ffn: dense moe*}"),
    ({"layout": {"fnn": "moe"}}, "model.layout.fnn", "moe", "no key 'fnn'", "Did you mean 'ffn'?"),
    ({"layout": {1: "moe"}}, "model.layout.1", "moe", "no key 1", "ffn"),
    ({"layout": {"ffn": "moe*3 swiglu*2"}}, "model.layout.ffn", "moe*3 swiglu*2", "n_layers = 4", "Take 1 off"),
    ({"layout": {"ffn": 7}}, "model.layout.ffn", 7, "text", "linear*3 full"),
    ({"layout": {"ffn": "moee moe*"}}, "model.layout.ffn", "moee moe*", "'moee' is neither", "Did you mean 'moe'?"),
    (
        {"layout": {"ffn": "dens moe*"}, "variants": {"ffn": {"dense": "swiglu"}}},
        "model.layout.ffn",
        "dens moe*",
        "'dens' is neither",
        "Did you mean 'dense'? Known: dense, ffn, moe, swiglu",
    ),
    ({"variants": []}, "model.variants", [], "a mapping", "{ffn: {wide"),
    ({"variants": {"atention": {}}}, "model.variants.atention", {}, "no key 'atention'", "Did you mean 'attention'?"),
    ({"variants": {"ffn": "dense"}}, "model.variants.ffn", "dense", "a mapping", "{wide"),
    ({"variants": {"ffn": {"dense": 3}}}, "model.variants.ffn.dense", 3, "a mapping", "{name: swiglu"),
    (
        {"variants": {"ffn": {"dense": {"name": None}}}},
        "model.variants.ffn.dense.name",
        None,
        "a block",
        "name: swiglu",
    ),
    ({"variants": {"ffn": {"Dense": "moe"}}}, "model.variants.ffn.Dense", "moe", "a pattern can hold", "lower-case"),
    ({"variants": {"ffn": {1: "moe"}}}, "model.variants.ffn.1", "moe", "a pattern can hold", "lower-case"),
    (
        {"ffn": None, "variants": {"ffn": {"few": {"top_k": 1}}}, "layout": {"ffn": "few"}},
        "model.variants.ffn.few",
        {"top_k": 1},
        "there is none",
        "set model.ffn",
    ),
    ({"overrides": {"layers": 0}}, "model.overrides", {"layers": 0}, "a list", "[{layers: 0..1, attention: mla}]"),
    ({"overrides": "mla"}, "model.overrides", "mla", "a list", "[{layers: 0..1, attention: mla}]"),
    ({"overrides": ["mla"]}, "model.overrides.0", "mla", "a mapping", "{layers: 0..1, attention: mla}"),
    ({"overrides": [{"ffn": "moe"}]}, "model.overrides.0.layers", None, "n_layers = 4", "layers: -1"),
    ({"overrides": [{"layers": None}]}, "model.overrides.0.layers", None, "n_layers = 4", "layers: -1"),
    ({"overrides": [{"layers": 4, "ffn": "moe"}]}, "model.overrides.0.layers", 4, "n_layers = 4", "0 to 3"),
    (
        {"overrides": [{"layers": 0, "ffn": "moe"}, {"layers": "1:4", "ffn": "moe"}]},
        "model.overrides.1.layers",
        "1:4",
        "n_layers = 4",
        "a..b",
    ),
    (
        {"overrides": [{"layer": 0, "ffn": "moe"}]},
        "model.overrides.0.layer",
        0,
        "no key 'layer'",
        "Did you mean 'layers'?",
    ),
    ({"overrides": [{"layers": 0, "fnn": 1}]}, "model.overrides.0.fnn", 1, "no key 'fnn'", "Did you mean 'ffn'?"),
    (
        {"overrides": [{"layers": 0, "ffn": "mo"}]},
        "model.overrides.0.ffn",
        "mo",
        "'mo' is neither",
        "Did you mean 'moe'?",
    ),
    ({"overrides": [{"layers": 0, "ffn": {"name": 1}}]}, "model.overrides.0.ffn.name", 1, "a block", "name: swiglu"),
    (
        {"ffn": None, "overrides": [{"layers": 0, "ffn": {"top_k": 1}}]},
        "model.overrides.0.ffn",
        {"top_k": 1},
        "there is none",
        "set model.ffn",
    ),
]


@pytest.mark.parametrize(("model", "path", "value", "why", "remedy"), MISFITS, ids=lambda part: str(part)[:40])
def test_misfit_is_refused_at_its_exact_path(model: Any, path: str, value: Any, why: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(**model)
    assert (caught.value.path, caught.value.value) == (path, value)
    assert why in caught.value.rule
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("model", [None, [], "tiny", 3])
def test_model_that_is_no_mapping_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(model, KINDS, names)
    assert caught.value.path == "model" and "n_layers" in caught.value.remedy


def test_null_takes_a_block_away_in_an_override_and_as_a_variant() -> None:
    layers = planned(overrides=[{"layers": [0, 2], "ffn": None}])
    assert [("ffn" in layer) for layer in layers] == [False, True, False, True]
    layers = planned(variants={"ffn": {"without": None}}, layout={"ffn": "without*1 ffn*"})
    assert [("ffn" in layer) for layer in layers] == [False, True, True, True]
    layers = planned(overrides=[{"layers": 0, "attention": {"qk_norm": None}}])
    assert layers[0]["attention"]["qk_norm"] is None and "qk_norm" not in layers[1]["attention"]


def test_empty_sections_are_as_good_as_none() -> None:
    empty = {"layout": None, "variants": None, "overrides": None}
    hollow = {"layout": {"ffn": None}, "variants": {"ffn": None}, "overrides": []}
    assert planned(**empty) == planned(**hollow) == planned()


def test_deepest_model_is_planned_within_seconds() -> None:
    began = time.perf_counter()
    layers = planned(
        n_layers=MAX_LAYERS, layout={"ffn": "swiglu*3 moe*"}, overrides=[{"layers": "0..-1", "ffn": {"top_k": 1}}]
    )
    assert len(layers) == MAX_LAYERS and layers[-1]["ffn"] == {"name": "moe", "top_k": 1}
    assert time.perf_counter() - began < 10
