"""A plan: which nodes each layer gets, and what is refused."""

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
MOE, SWIGLU = {"name": "moe", "top_k": 6}, {"name": "swiglu"}


def planned(**model: Any) -> list[dict[str, dict[str, Any]]]:
    return plan({"n_layers": 4, "attention": {"name": "gqa"}, "ffn": MOE} | model, KINDS, REGISTERED.__getitem__)


def test_model_without_layout_has_its_own_nodes_in_every_layer() -> None:
    own = [{"attention": {"name": "gqa"}, "ffn": MOE}] * 4
    hollow = {"layout": {"ffn": None}, "variants": {"ffn": None}, "overrides": []}
    assert planned() == planned(layout=None, variants=None, overrides=None) == planned(**hollow) == own
    bare = plan({"n_layers": 2, "ffn": "swiglu", "attention": None}, KINDS, REGISTERED.__getitem__)
    assert bare == [{"ffn": SWIGLU}] * 2
    assert all(type(n["ffn"]) is dict for n in planned(ffn=MappingProxyType(SWIGLU | MOE), layout={"ffn": "moe*"}))


def test_layout_and_override_can_give_a_kind_that_the_model_lacks() -> None:
    model = {"n_layers": 2, "layout": {"ffn": "moe swiglu"}, "overrides": [{"layers": 1, "attention": "mla"}]}
    found = plan(model, KINDS, REGISTERED.__getitem__)
    assert found == [{"ffn": {"name": "moe"}}, {"ffn": SWIGLU, "attention": {"name": "mla"}}]


# Variants of ffn, a pattern, and what the layers then have: a variant comes before a block, and a block that is not the
# model's own has no parameters; the name of the own node, or of its kind, brings its own.
DENSE = {"name": "swiglu", "d_ff": 7}
NAMED: list[tuple[dict[str, Any], str, list[Any]]] = [
    ({"dense": DENSE, "swiglu": DENSE | {"d_ff": 9}}, "dense swiglu moe moe", [DENSE, DENSE | {"d_ff": 9}, MOE, MOE]),
    ({}, "swiglu*1 moe*", [SWIGLU, MOE, MOE, MOE]),
    ({}, "swiglu*1 ffn*", [SWIGLU, MOE, MOE, MOE]),
    ({"few": {"top_k": 1, "z": 0.1}, "unused": {}}, "moe* few", [MOE, MOE, MOE, {"name": "moe", "top_k": 1, "z": 0.1}]),
    ({"dense": "swiglu", "swiglu": DENSE}, "dense*1 moe*", [SWIGLU, MOE, MOE, MOE]),
    ({"without": None}, "without*1 ffn*", [None, MOE, MOE, MOE]),
]


@pytest.mark.parametrize(("variants", "pattern", "expected"), NAMED)
def test_name_in_a_layout_is_a_variant_then_the_own_node_then_a_block(
    variants: Any, pattern: str, expected: Any
) -> None:
    assert [layer.get("ffn") for layer in planned(layout={"ffn": pattern}, variants={"ffn": variants})] == expected


def test_overrides_apply_in_order_and_only_to_their_layers() -> None:
    layers = planned(
        layout={"ffn": "swiglu moe*"},
        variants={"attention": {"wide": {"window": 64}}},
        overrides=[
            {"layers": "0..2", "attention": {"window": 8}, "ffn": "swiglu"},
            {"layers": 0, "ffn": "moe"},
            {"layers": 1, "attention": {"name": "mla", "rank": 4}},
            {"layers": [1, 2], "attention": {"window": 9}},
            {"layers": 2, "ffn": None},
            {"layers": -1, "attention": "wide"},
        ],
    )
    assert [layer["attention"] for layer in layers] == [
        {"name": "gqa", "window": 8},
        {"name": "mla", "rank": 4, "window": 9},
        {"name": "gqa", "window": 9},
        {"name": "gqa", "window": 64},
    ]
    assert [layer.get("ffn") for layer in layers] == [MOE, SWIGLU, None, MOE]


YARN = {"position": {"name": "yarn", "factor": 40}}
PATCHES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
    ({"a": {"x": 1, "y": {"z": 2}}}, {"a": {"y": {"w": 3}}}, {"a": {"x": 1, "y": {"z": 2, "w": 3}}}),
    ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
    ({"a": {"x": 1}}, {"a": None}, {"a": None}),
    ({"a": None}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ({"position": "rope"}, {"position": {"theta": 5}}, {"position": {"name": "rope", "theta": 5}}),
    (YARN, {"position": {"name": "rope"}}, {"position": {"name": "rope"}}),
    (YARN, {"position": "rope"}, {"position": "rope"}),
]


def test_patch_reaches_into_children_and_a_named_child_replaces() -> None:
    for own, patch, patched in PATCHES:
        layers = planned(attention={"name": "gqa", **own}, overrides=[{"layers": 0, "attention": patch}])
        assert layers[0]["attention"] == {"name": "gqa", **patched} and layers[1]["attention"] == {"name": "gqa", **own}


word = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
parameters = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers() | st.dictionaries(word, st.integers()))
patterns = st.sampled_from([None, "moe", "swiglu moe*", "few ffn*", "moe*1 dense*", ["few", "dense*"], "(ffn few)*"])
changes = st.tuples(st.integers(-2, 1), st.sampled_from(["moe", "few", "dense", "swiglu"]) | parameters)


@settings(max_examples=25)
@given(st.sampled_from([2, 4, 6, 8, 10]), parameters, parameters, patterns, st.lists(changes, max_size=3))
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
    layers = plan(model, KINDS, REGISTERED.__getitem__)
    assert model == before and len(layers) == n_layers
    assert all(type(node) is dict and node["name"] for layer in layers for node in layer.values())
    mutable = [id(part) for layer in layers for node in layer.values() for part in containers(node)]
    assert len(mutable) == len(set(mutable)) and not set(mutable) & {id(part) for part in containers(model)}


def containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] * isinstance(value, dict | list) + [part for child in inner for part in containers(child)]


@settings(max_examples=40)
@given(parameters, parameters, st.integers(-4, 3))
def test_patch_keeps_every_parameter_that_it_does_not_name(own: dict[str, Any], patch: dict[str, Any], at: int) -> None:
    node = {"name": "moe", **own}
    layers = planned(ffn=node, overrides=[{"layers": at, "ffn": patch}])
    patched = layers.pop(at)["ffn"]
    assert all(layer["ffn"] == node for layer in layers)
    assert patched.keys() == node.keys() | patch.keys()
    for key in patched:
        both = isinstance(node.get(key), dict) and isinstance(patch.get(key), dict)
        assert patched[key] == (node[key] | patch[key] if both else patch.get(key, node.get(key)))


FEW, OVERRIDES = {"few": {"top_k": 1}}, "model.overrides"
MISFITS: list[tuple[dict[str, Any], str, Any]] = [
    *(({"n_layers": n}, "model.n_layers", n) for n in (0, 10_001, True, "4", None)),
    ({"ffn": 3}, "model.ffn", 3),
    ({"ffn": ["moe"]}, "model.ffn", ["moe"]),
    ({"ffn": {"top_k": 2}}, "model.ffn.name", None),
    ({"ffn": {"name": 3}}, "model.ffn.name", 3),
    ({"ffn": ""}, "model.ffn.name", ""),
    ({"layout": "moe"}, "model.layout", "moe"),
    ({"layout": {"fnn": "moe"}}, "model.layout.fnn", "moe"),
    ({"layout": {1: "moe"}}, "model.layout.1", "moe"),
    *(({"layout": {"ffn": p}}, "model.layout.ffn", p) for p in ("moe*3 swiglu*2", 7, "moee moe*", "swiglu")),
    ({"layout": {"ffn": "dens moe*"}, "variants": {"ffn": {"dense": "swiglu"}}}, "model.layout.ffn", "dens moe*"),
    ({"variants": []}, "model.variants", []),
    ({"variants": {"atention": {}}}, "model.variants.atention", {}),
    ({"variants": {"ffn": "dense"}}, "model.variants.ffn", "dense"),
    ({"variants": {"ffn": {"dense": 3}}}, "model.variants.ffn.dense", 3),
    ({"variants": {"ffn": {"dense": {"name": None}}}}, "model.variants.ffn.dense.name", None),
    ({"variants": {"ffn": {"Dense": "moe"}}}, "model.variants.ffn.Dense", "moe"),
    ({"variants": {"ffn": {1: "moe"}}}, "model.variants.ffn.1", "moe"),
    ({"ffn": None, "variants": {"ffn": FEW}, "layout": {"ffn": "few"}}, "model.variants.ffn.few", {"top_k": 1}),
    ({"overrides": {"layers": 0}}, OVERRIDES, {"layers": 0}),
    ({"overrides": "mla"}, OVERRIDES, "mla"),
    ({"overrides": ["mla"]}, f"{OVERRIDES}.0", "mla"),
    ({"overrides": [{"ffn": "moe"}]}, f"{OVERRIDES}.0.layers", None),
    ({"overrides": [{"layers": None}]}, f"{OVERRIDES}.0.layers", None),
    ({"overrides": [{"layers": 4, "ffn": "moe"}]}, f"{OVERRIDES}.0.layers", 4),
    ({"overrides": [{"layers": 0, "ffn": "moe"}, {"layers": "1:4", "ffn": "moe"}]}, f"{OVERRIDES}.1.layers", "1:4"),
    ({"overrides": [{"layer": 0, "ffn": "moe"}]}, f"{OVERRIDES}.0.layer", 0),
    ({"overrides": [{"layers": 0, "fnn": 1}]}, f"{OVERRIDES}.0.fnn", 1),
    ({"overrides": [{"layers": 0, "ffn": "mo"}]}, f"{OVERRIDES}.0.ffn", "mo"),
    ({"overrides": [{"layers": 0, "ffn": {"name": 1}}]}, f"{OVERRIDES}.0.ffn.name", 1),
    ({"ffn": None, "overrides": [{"layers": 0, "ffn": {"top_k": 1}}]}, f"{OVERRIDES}.0.ffn", {"top_k": 1}),
]


def test_misfit_is_refused_at_its_exact_path() -> None:
    for model, path, value in MISFITS:
        with pytest.raises(ConfigError) as caught:
            planned(**model)
        assert (caught.value.path, caught.value.value) == (path, value) and caught.value.remedy, model
    for other in (None, [], "tiny", 3):
        with pytest.raises(ConfigError) as caught:
            plan(other, KINDS, REGISTERED.__getitem__)  # type: ignore[arg-type]
        assert caught.value.path == "model"
    with pytest.raises(ConfigError) as caught:  # with the nearest, of variants and blocks
        planned(layout={"ffn": "dens moe*"}, variants={"ffn": {"dense": "swiglu"}})
    assert "'dense'? Known: dense, ffn, moe, swiglu" in caught.value.remedy


def test_deepest_model_is_planned_within_seconds() -> None:
    patch = [{"layers": "0..-1", "ffn": {"top_k": 1}}]

    def deepest() -> None:
        layers = planned(n_layers=MAX_LAYERS, layout={"ffn": "swiglu*3 moe*"}, overrides=patch)
        assert len(layers) == MAX_LAYERS and layers[-1]["ffn"] == {"name": "moe", "top_k": 1}

    assert takes_less(10, deepest)
