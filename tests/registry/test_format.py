"""A null for a child means none, as saved compositions have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.registry.presets import FORMAT
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.conf import CONF

SMALL = {"vocab_size": 61, "d_model": 48, "n_layers": 2, "position": "rope", "ffn": "swiglu", "norm": "rmsnorm"}
SMALL |= {"residual": "prenorm", "attention": {"name": "gqa", "n_heads": 4}, "qk_norm": "per_head"}
NULL = {"name": "gqa", "n_heads": 4, "qk_norm": None}


def norms(model: Any) -> list[str]:
    """Of each layer, the name of what normalises queries and keys."""
    decoder: Decoder = compose(model, device="meta")
    return [type(layer.attention.qk_norm).__name__ for layer in decoder.layers]  # type: ignore[union-attr]


def test_null_child_is_none_in_text_in_a_variant_and_in_a_layer() -> None:
    assert norms(SMALL) == ["PerHead", "PerHead"]
    assert norms({**SMALL, "attention": NULL}) == ["NoneType", "NoneType"]
    variants = {"variants": {"attention": {"plain": {"qk_norm": None}}}, "layout": {"attention": "plain attention"}}
    assert norms({**SMALL, **variants}) == ["NoneType", "PerHead"]
    assert norms({**SMALL, "overrides": [{"layers": 1, "attention": {"qk_norm": None}}]}) == ["PerHead", "NoneType"]
    assert norms({**SMALL, "overrides": [{"layers": 1, "qk_norm": None}]}) == ["PerHead", "NoneType"]
    back = [{"layers": 1, "attention": {"qk_norm": "inherit"}}]
    assert norms({**SMALL, "attention": NULL, "overrides": back}) == ["NoneType", "PerHead"]


@pytest.mark.parametrize(
    ("overrides", "layer", "child"),
    [
        (["model=gpt_oss_20b", "model.attention.scores=null"], -1, "scores"),
        (["model=qwen3_8b", "model.overrides=[{layers: 0, attention: {qk_norm: null}}]"], 0, "qk_norm"),
        (["+model.balance.name=expert", "model.gating.balance=null"], -1, "balance"),
    ],
)
def test_null_on_the_command_line_takes_a_child_of_a_preset_away(overrides: list[str], layer: int, child: str) -> None:
    decoder = compose(compose_config(overrides).model, device="meta")
    holder: Any = decoder.layers[layer].ffn.gating if child == "balance" else decoder.layers[layer].attention
    assert not getattr(holder, child)


def test_null_for_a_child_that_a_block_needs_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_config(["model.ffn.gating=null"]).model)
    assert (caught.value.path, caught.value.value) == ("model.ffn.gating", "null")


def test_saved_composition_says_null_where_it_was_written_and_nothing_where_it_was_not() -> None:
    assert check({**SMALL, "attention": {**NULL, "scores": "inherit"}})["attention"] == NULL
    composed = check(compose_config(["model=qwen3_8b"]).model)
    assert composed["format"] == FORMAT
    assert composed["attention"].keys().isdisjoint(("qk_norm", "scores", "position"))
    assert check(composed) == composed


def test_composition_of_a_newer_version_is_refused() -> None:
    for written in (FORMAT + 1, 1, "2", True):
        with pytest.raises(ConfigError, match="format"):
            check({**SMALL, "format": written})


def words(value: Any) -> list[str]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [word for item in inner for word in words(item)]


@pytest.mark.slow
def test_ablation_that_takes_a_child_away_changes_the_model() -> None:
    """Every override of conf/ablation that takes something away."""
    found = [word for file in (CONF / "ablation").glob("*.yaml") for word in words(yaml.safe_load(file.read_text()))]
    whole = [type(m) for m in compose(compose_config([]).model, device="meta").modules()]
    taken = {o for o in found if o.startswith("model") and o.endswith("=null")}
    for override in taken:
        assert [type(m) for m in compose(compose_config([override]).model, device="meta").modules()] != whole, override
    assert taken
