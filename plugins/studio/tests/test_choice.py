"""A choice as composition, text and command: all three are the same model, and requests are data."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml

from blockwright.blocks.compose import check, compose
from blockwright.plugins.hub.fingerprint import difference
from blockwright.plugins.studio.answers import same as same_model
from blockwright.plugins.studio.choice import Choice, base
from blockwright.registry import ConfigError, presets
from blockwright.training.configuration.composing import compose_config

# Changes → what they make of the composition, as path and value.
CHANGES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "a block": ("deepseek_v2", {"attention": "gqa"}, {"attention": {"name": "gqa"}}),
    "a block and its number": (
        "deepseek_v2",
        {"attention.n_heads": "64", "attention": "gqa"},
        {"attention": {"name": "gqa", "n_heads": 64}},
    ),
    "a number": ("deepseek_v2", {"n_layers": "7"}, {"n_layers": 7}),
    "no number": ("deepseek_v2", {"attention.q_lora_rank": "null"}, {"attention.q_lora_rank": None}),
    "a block more": ("deepseek_v2", {"qk_norm": "per_head", "attention": "gqa"}, {"qk_norm": {"name": "per_head"}}),
    "no block": ("qwen3_8b", {"qk_norm": "null"}, {"qk_norm": None}),
    "a child": ("deepseek_v2", {"ffn.shared": "gelu"}, {"ffn.shared": "gelu"}),
    "a child and its number": (
        "deepseek_v2",
        {"ffn.shared": "gelu", "ffn.shared.d_ff": "77"},
        {"ffn.shared": {"name": "gelu", "d_ff": 77}},
    ),
    "a child's number": ("deepseek_v2", {"ffn.shared.d_ff": "77"}, {"ffn.shared": {"name": "swiglu", "d_ff": 77}}),
    "a child of its own": ("deepseek_v2", {"attention.q_norm": "layernorm"}, {"attention.q_norm": "layernorm"}),
    "no child": ("deepseek_v2", {"ffn.shared": "null"}, {"ffn.shared": None}),
    "one of a list": (
        "deepseek_v2",
        {"gating.balance.0": "device", "gating.balance.0.n_devices": "4"},
        {"gating.balance.0": {"name": "device", "n_devices": 4}},
    ),
    "a variant": ("deepseek_v2", {"variants.ffn.dense": "gelu"}, {"variants.ffn.dense": "gelu"}),
    "a variant more": (
        "deepseek_v2",
        {"variants.attention.wide": "{n_heads: 64}", "layout.attention": "wide*3 attention*"},
        {"variants.attention.wide": {"n_heads": 64}, "layout.attention": "wide*3 attention*"},
    ),
    "a pattern with brackets": ("deepseek_v2", {"layout.ffn": "dense*2 (ffn)*2"}, {"layout.ffn": "dense*2 (ffn)*2"}),
    "the vocabulary of the data": ("tiny", {"d_model": "96"}, {"d_model": 96, "vocab_size": 257}),
    "predictions": ("deepseek_v2", {"mtp.depth": "1"}, {"mtp": {"depth": 1}}),
}  # fmt: skip


def value(model: Any, path: str) -> Any:
    for key in path.split("."):
        model = model[int(key)] if isinstance(model, list) else model.get(key)
    return model


def same(choice: Choice) -> None:
    """The composition, its text, and what the command trains are one."""
    assert yaml.safe_load(choice.text) == choice.composition
    words = shlex.split(choice.command)
    assert words[:2] == ["blockwright", "train"]
    trained = compose_config(words[2:]).model
    assert same_model(choice.text, trained)
    assert difference(compose(choice.text, device="meta"), compose(trained, device="meta")) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHANGES][::2])
def test_changes_are_made_in_all_three_forms(name: str) -> None:
    preset, changes, made = CHANGES[name]
    choice = Choice(preset, changes if "n_layers" in made else {**changes, "n_layers": "4"})
    for path, expected in made.items():
        assert value(choice.composition, path) == expected
    same(choice)


@pytest.mark.parametrize(
    "changes",
    [{"layout.ffn": "dense*2 ffn*"}, {"gating.balance.alpha": "0.5"}],
)
def test_another_model_is_not_the_same(changes: dict[str, str]) -> None:
    assert not same_model(base("tiny"), Choice("tiny", changes).composition)


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets.names()[::16])
def test_a_preset_is_itself(preset: str) -> None:
    same(Choice(preset))


def test_a_preset_is_not_changed_by_a_choice() -> None:
    assert Choice("tiny", {"attention.n_heads": "4"}).composition != base("tiny") == Choice("tiny").composition


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "'${oc.env:HOME}'", "a${b}", "{x: ${oc.env:HOME}}"])
def test_interpolation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="interpolation"):
        Choice("tiny", {"attention.n_heads": text})


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("../tiny", {}),
        ("nothing", {}),
        ("tiny", {"": "1"}),
        ("tiny", {"attention..n_heads": "1"}),
        ("tiny", {"attention._target_": "os.system"}),
        ("tiny", {"../x": "1"}),
        ("tiny", {"attention=gqa model.x": "1"}),
        ("tiny", {".".join(["a"] * 100): "1"}),
        ("tiny", {"d_model": "1" * 5000}),
        ("tiny", {"d_model": "1\n2"}),
        ("tiny", {f"a{i}": "1" for i in range(300)}),
    ],
)
def test_what_can_be_no_choice_is_refused(preset: str, changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        Choice(preset, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "{_target_: os.system, command: touch ran}"},
        {"attention.q_norm": "{_target_: os.system}"},
        {"variants": "{ffn: {dense: {_target_: os.system}}}"},
        {"attention.n_heads": "1,2"},
        {"gating.balance.9": "device"},
        {"attention.nothing.more": "1"},
        {"nothing": "1"},
    ],
)
def test_what_builds_nothing_is_refused_before_anything_is_built(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        check(Choice("deepseek_v2", changes).composition)
