"""Layers are grouped, and each group has its counterpart: known layouts, and rules that hold for any."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwright import registry
from blockwright.blocks.compose import preset
from blockwright.lab.difference.difference import _tokens, aligned, grouped
from blockwright.lab.difference.settings import ABSENT, Entry, Name, alike, compared, read
from blockwright.registry import Node
from blockwright.registry.layout import plan

DENSE, MOE, WIDE = (
    {"ffn": "swiglu", "ffn.d_ff": 8},
    {"ffn": "moe", "ffn.n_experts": 4},
    {"ffn": "swiglu", "ffn.d_ff": 16},
)
LOCAL, GLOBAL = {"a": "sliding", "a.window": 4096, "a.heads": 4}, {"a": "sliding", "a.window": None, "a.heads": 4}


def layers(*groups):
    return [group.layers if group else () for group in groups]


def test_groups_stand_next_to_their_likes():
    assert [g.layers for g in grouped([DENSE, MOE, DENSE, MOE])] == [(0, 2), (1, 3)]
    pairs = aligned("ffn", grouped([DENSE, MOE, MOE]), grouped([MOE, WIDE, WIDE]))
    assert [layers(p.a, p.b) for p in pairs] == [[(0,), (1, 2)], [(1, 2), (0,)]]
    assert [p.same for p in pairs] == [False, True]
    other = {**LOCAL, "a.window": 512}
    pairs = aligned("attention", grouped([LOCAL, GLOBAL]), grouped([GLOBAL, other]))
    assert [layers(p.a, p.b) for p in pairs] == [[(0,), (1,)], [(1,), (0,)]]
    pairs = aligned("attention", grouped([GLOBAL, LOCAL]), grouped([other]))
    assert [layers(p.a, p.b) for p in pairs] == [[(0,), ()], [(1,), (0,)]]
    (first, second) = aligned("ffn", grouped([DENSE]), grouped([DENSE, MOE]))
    assert first.same and not second.same and second.a is None
    assert {e.a for e in second.entries} == {ABSENT}
    assert second.to_plain()["layers"] == {"b": [1]}
    assert second.to_plain()["settings"][0] == {"path": "ffn", "same": False, "b": "moe"}


of_layers = st.lists(st.sampled_from([DENSE, MOE, WIDE, LOCAL, GLOBAL]), min_size=1, max_size=8)


@given(of_layers, of_layers)
def test_every_layer_is_in_one_pair_and_no_group_is_left_beside_one(a, b):
    ours, theirs = grouped(a), grouped(b)
    pairs = aligned("x", ours, theirs)
    assert sorted(i for p in pairs if p.a for i in p.a.layers) == list(range(len(a)))
    assert sorted(i for p in pairs if p.b for i in p.b.layers) == list(range(len(b)))
    assert len(pairs) == max(len(ours), len(theirs))
    equal = [p for p in pairs if p.a and p.b and p.same]
    assert len(equal) == sum(g.settings == h.settings for g, h in itertools.product(ours, theirs))


def test_values_are_compared_as_yaml_means_them_and_paths_stay_in_order():
    entries = compared({"x": 1, "y": 2, "z": 3}, {"first": 0, "y": 2, "new": 5, "x": 1})
    assert [e.path for e in entries] == ["first", "x", "y", "new", "z"]
    nan = float("nan")
    assert alike(1, 1.0) and alike(nan, nan) and alike([1, nan], [1.0, nan]) and alike(ABSENT, ABSENT)
    assert not alike(1, True) and not alike(0, False) and not alike(None, ABSENT) and not alike([1], [1, 2])
    assert Entry("x", None, None).to_plain() == {"path": "x", "same": True, "a": None, "b": None}


@pytest.mark.parametrize(
    ("each", "steps", "tokens"),
    [(5, 3.0, 15), (10**400, 2.0, None), (5, math.inf, None), (5, math.nan, None), (5, None, None), ("x", 2.0, None)],
)
def test_tokens_that_no_run_has_are_not_shown(each, steps, tokens, tmp_path):
    (tmp_path / "curves.json").write_text(json.dumps({"tokens_per_step": each}))
    assert _tokens(tmp_path, steps) == ({} if tokens is None else {"tokens": tokens})


def test_settings_stand_where_they_act_with_their_defaults():
    of_model, of_node = preset("tiny", {"vocab_size": 257}), preset("tiny", {"vocab_size": 257})
    of_node["attention"] = {"name": "mla", "position": of_node["position"]}
    one, other = read(of_model), read(of_node)
    assert one.layers == other.layers and one.around == other.around
    first = one.layers["attention"][0]
    assert first["attention"] == "mla" and first["attention.position"] == "rope"
    assert isinstance(first["attention.position"], Name) and not isinstance(first["attention.position.pairing"], Name)
    assert first["attention.position.theta"] == 10000.0  # a default
    found = read(preset("tiny", {"vocab_size": 257, "layout": {"ffn": "dense ffn dense ffn"}})).layers["ffn"]
    assert [layer["ffn"] for layer in found] == ["swiglu", "moe", "swiglu", "moe"]
    assert found[1]["ffn.gating.balance.0"] == "expert" and "ffn.gating" not in found[0]
    written = {"name": "gqa", "n_heads": 8, "n_kv_heads": 2, "head_dim": 24}
    left_out = {key: value for key, value in written.items() if key != "head_dim"}
    one, other = (read(preset("tiny", {"vocab_size": 257, "attention": node})) for node in (written, left_out))
    assert one.layers == other.layers and one.layers["attention"][0]["attention.head_dim"] == 24
    found = read(preset("gpt2"))
    assert found.around["position"] == "learned" and found.layers["attention"][0]["attention.position"] == "none"
    assert "position" not in read(preset("tiny", {"vocab_size": 257})).around


@pytest.mark.parametrize("name", ["deepseek_v4_flash", "nemotron_h_8b"])
def test_blocks_are_those_of_the_registry_s_own_walk(name):
    found = read(preset(name))
    planned = plan(found.decoder.config, registry.layer_kinds(), registry.names)
    for layer, nodes in enumerate(planned):
        scope = {kind: Node(node, f"model.{kind}") for kind, node in nodes.items()}
        for part, settings in found.layers.items():
            names = [value for value in settings[layer].values() if isinstance(value, Name)]
            walked = registry.walk(part, scope[part], scope) if part in scope else ()
            assert names == [entry.name for _, entry, _ in walked], (layer, part)
