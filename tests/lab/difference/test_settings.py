"""Settings of a composition stand where they act, with their defaults."""

from __future__ import annotations

import pytest

from blockwright import registry
from blockwright.blocks.compose import preset
from blockwright.lab.difference.settings import Name, flat, read
from blockwright.registry import Node
from blockwright.registry.layout import plan


def test_child_of_the_model_stands_in_the_block_that_takes_it() -> None:
    of_model, of_node = preset("tiny", {"vocab_size": 257}), preset("tiny", {"vocab_size": 257})
    of_node["attention"] = {"name": "mla", "position": of_node["position"]}
    one, other = read(of_model), read(of_node)
    assert one.layers == other.layers and one.around == other.around
    first = one.layers["attention"][0]
    assert first["attention"] == "mla" and first["attention.position"] == "rope"
    assert isinstance(first["attention.position"], Name) and not isinstance(first["attention.position.pairing"], Name)
    assert first["attention.position.theta"] == 10000.0  # a default


def test_layout_says_which_layers_have_which_settings() -> None:
    found = read(preset("tiny", {"vocab_size": 257, "layout": {"ffn": "dense ffn dense ffn"}})).layers["ffn"]
    assert [layer["ffn"] for layer in found] == ["swiglu", "moe", "swiglu", "moe"]
    assert found[1]["ffn.gating.balance.0"] == "expert" and "ffn.gating" not in found[0]


def test_width_that_follows_from_others_is_the_number() -> None:
    written = {"name": "gqa", "n_heads": 8, "n_kv_heads": 2, "head_dim": 24}
    left_out = {key: value for key, value in written.items() if key != "head_dim"}
    one, other = (read(preset("tiny", {"vocab_size": 257, "attention": node})) for node in (written, left_out))
    assert one.layers == other.layers and one.layers["attention"][0]["attention.head_dim"] == 24


def test_position_of_embeddings_is_around_the_layers() -> None:
    found = read(preset("gpt2"))
    assert found.around["position"] == "learned" and found.layers["attention"][0]["attention.position"] == "none"
    assert "position" not in read(preset("tiny", {"vocab_size": 257})).around


@pytest.mark.parametrize("name", ["deepseek_v4_flash", "kimi_linear_48b_a3b", "nemotron_h_8b", "deepseek_vl2_tiny"])
def test_blocks_are_those_of_the_registry_s_own_walk(name: str) -> None:
    found = read(preset(name))
    planned = plan(found.decoder.config, registry.layer_kinds(), registry.names)
    for layer, nodes in enumerate(planned):
        scope = {kind: Node(node, f"model.{kind}") for kind, node in nodes.items()}
        for part, settings in found.layers.items():
            names = [value for value in settings[layer].values() if isinstance(value, Name)]
            walked = registry.walk(part, scope[part], scope) if part in scope else ()
            assert names == [entry.name for _, entry, _ in walked], (layer, part)


def test_flat_keeps_lists_of_plain_values() -> None:
    assert flat({"a": {"b": [1, 2]}, "c": [{"d": 1}, {"d": 2}]}) == {"a.b": [1, 2], "c.0.d": 1, "c.1.d": 2}
