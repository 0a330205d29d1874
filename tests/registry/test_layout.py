"""A plan: which nodes each layer gets, and how each refusal reads."""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickest import takes_less

from blockwright.registry.errors import ConfigError
from blockwright.registry.layout import MAX_LAYERS, plan

REGISTERED = {"attention": ["gqa", "mla", "linear"], "ffn": ["swiglu", "moe"]}
KINDS = list(REGISTERED)


def planned(**model: Any) -> list[dict[str, dict[str, Any]]]:
    return plan({"n_layers": 4, "attention": {"name": "gqa"}, "ffn": {"name": "moe", "top_k": 6}} | model, KINDS, names)


def names(kind: str) -> list[str]:
    return REGISTERED[kind]


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


word = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
parameters = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers() | st.dictionaries(word, st.integers()))
patterns = st.sampled_from([None, "moe", "swiglu moe*", "few ffn*", "moe*1 dense*", ["few", "dense*"], "(ffn few)*"])


@settings(max_examples=25)
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


@settings(max_examples=40)
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
    ({"variants": {"ffn": {"Dense": "moe"}}}, "model.variants.ffn.Dense", "moe", "usable in a pattern", "lower-case"),
    ({"variants": {"ffn": {1: "moe"}}}, "model.variants.ffn.1", "moe", "usable in a pattern", "lower-case"),
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
    def deepest() -> None:
        layers = planned(
            n_layers=MAX_LAYERS, layout={"ffn": "swiglu*3 moe*"}, overrides=[{"layers": "0..-1", "ffn": {"top_k": 1}}]
        )
        assert len(layers) == MAX_LAYERS and layers[-1]["ffn"] == {"name": "moe", "top_k": 1}

    assert takes_less(10, deepest)
