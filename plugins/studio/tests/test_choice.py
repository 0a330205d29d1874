"""A choice as composition, text and command; answers with true numbers; requests are data."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
import yaml

from blockwright import command
from blockwright.blocks.compose import check, compose, preset
from blockwright.blocks.cost import count_parameters, forward_flops_per_token
from blockwright.plugins.hub.family import difference
from blockwright.plugins.studio.answers import answer
from blockwright.plugins.studio.answers import same as same_model
from blockwright.plugins.studio.choice import Choice, base
from blockwright.registry import ConfigError, names, presets
from blockwright.registry.command import run_command
from blockwright.training.configuration.composing import compose_config

# Changes → what they make of the composition, as path and value.
CHANGES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("deepseek_v2", {"attention": "gqa"}, {"attention": {"name": "gqa"}}),
    ("deepseek_v2", {"attention.n_heads": "64", "attention": "gqa"}, {"attention": {"name": "gqa", "n_heads": 64}}),
    ("deepseek_v2", {"n_layers": "7"}, {"n_layers": 7}),
    ("deepseek_v2", {"qk_norm": "per_head", "attention": "gqa"}, {"qk_norm": {"name": "per_head"}}),
    ("qwen3_8b", {"qk_norm": "null"}, {"qk_norm": None}),
    ("deepseek_v2", {"ffn.shared": "gelu", "ffn.shared.d_ff": "77"}, {"ffn.shared": {"name": "gelu", "d_ff": 77}}),
    ("deepseek_v2", {"ffn.shared.d_ff": "77"}, {"ffn.shared": {"name": "swiglu", "d_ff": 77}}),
    ("deepseek_v2", {"gating.balance.0": "device", "gating.balance.0.n_devices": "4"},
     {"gating.balance.0": {"name": "device", "n_devices": 4}}),
    ("deepseek_v2", {"variants.attention.wide": "{n_heads: 64}", "layout.attention": "wide*3 attention*"},
     {"variants.attention.wide": {"n_heads": 64}, "layout.attention": "wide*3 attention*"}),
    ("deepseek_v2", {"layout.ffn": "dense*2 (ffn)*2"}, {"layout.ffn": "dense*2 (ffn)*2"}),
    ("tiny", {"d_model": "96"}, {"d_model": 96, "vocab_size": 257}),  # the vocabulary of the data
    ("deepseek_v2", {"mtp.depth": "1"}, {"mtp": {"depth": 1}}),
    # Their compositions alone, quickly:
    ("deepseek_v2", {"attention.q_lora_rank": "null"}, {"attention.q_lora_rank": None}),
    ("deepseek_v2", {"ffn.shared": "gelu"}, {"ffn.shared": "gelu"}),
    ("deepseek_v2", {"attention.q_norm": "layernorm"}, {"attention.q_norm": "layernorm"}),
    ("deepseek_v2", {"ffn.shared": "null"}, {"ffn.shared": None}),
    ("deepseek_v2", {"variants.ffn.dense": "gelu"}, {"variants.ffn.dense": "gelu"}),
]  # fmt: skip


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


def test_changes_are_made_in_the_composition() -> None:
    for name, changes, made in CHANGES:
        composition = Choice(name, changes).composition
        assert {path: value(composition, path) for path in made} == made, changes


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "changes", "made"), CHANGES[:12][::2])
def test_a_choice_is_one_in_all_three_forms(preset: str, changes: dict[str, str], made: dict[str, Any]) -> None:
    same(Choice(preset, changes if "n_layers" in made else {**changes, "n_layers": "4"}))


@pytest.mark.parametrize("changes", [{"layout.ffn": "dense*2 ffn*"}, {"gating.balance.alpha": "0.5"}])
def test_another_model_is_not_the_same(changes: dict[str, str]) -> None:
    assert not same_model(base("tiny"), Choice("tiny", changes).composition)


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets.names()[::16])
def test_a_preset_is_itself(preset: str) -> None:
    same(Choice(preset))


def test_a_preset_is_not_changed_by_a_choice() -> None:
    assert Choice("tiny", {"attention.n_heads": "4"}).composition != base("tiny") == Choice("tiny").composition


INTERPOLATIONS = ("${oc.env:HOME}", "'${oc.env:HOME}'", "a${b}", "{x: ${oc.env:HOME}}")
NO_CHOICES: list[tuple[str, dict[str, str]]] = [
    *(("tiny", {"attention.n_heads": text}) for text in INTERPOLATIONS),
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
]


def test_what_can_be_no_choice_is_refused() -> None:
    for name, changes in NO_CHOICES:
        with pytest.raises(ConfigError):
            Choice(name, changes)
            pytest.fail(str(changes))


BUILD_NOTHING = [
    {"attention": "{_target_: os.system, command: touch ran}"},
    {"attention.q_norm": "{_target_: os.system}"},
    {"variants": "{ffn: {dense: {_target_: os.system}}}"},
    {"attention.n_heads": "1,2"},
    {"gating.balance.9": "device"},
    {"attention.nothing.more": "1"},
    {"nothing": "1"},
]


def test_what_builds_nothing_is_refused_before_anything_is_built() -> None:
    for changes in BUILD_NOTHING:
        with pytest.raises(ConfigError):
            check(Choice("deepseek_v2", changes).composition)
            pytest.fail(str(changes))


def draw(changes: dict[str, str], of: str = "deepseek_v2", what: str = "draw") -> dict[str, Any]:
    given = answer({"what": what, "preset": of, "changes": changes})
    assert json.loads(json.dumps(given, allow_nan=False)) == given
    return given


def test_a_picture_has_the_costs_of_the_model_and_a_place_for_each_of_its_blocks() -> None:
    drawn = draw({"attention": "gqa", "n_layers": "3"})
    counted = count_parameters(compose(preset("deepseek_v2", {"attention": "gqa", "n_layers": 3}), device="meta"))
    totals = drawn["totals"]
    assert (totals["parameters"]["value"], totals["active"]["value"]) == (counted.total, counted.active)
    assert drawn["model"]["attention"] == {"name": "gqa"} and "refusal" not in drawn
    places = drawn["boxes"]
    assert places["layers.0.ffn"] == "variants.ffn.dense" and places["layers.1.ffn"] == "ffn"
    assert places["layers.0.attention.position"] == "position"  # the model's own
    assert places["layers.1.ffn.shared"] == "ffn.shared"
    assert places["layers.1.ffn.gating.balance.2"] == "gating.balance.2"
    shown = {place for path, place in places.items() if f'data-path="{path}"' in drawn["picture"]}
    blocks = {"attention", "ffn", "variants.ffn.dense", "ffn.shared", "gating", "gating.balance.0", "experts"}
    assert shown >= {*blocks, "norm", "position", "d_model", "vocab_size"}


def test_costs_that_are_remembered_are_those_that_are_measured() -> None:
    """Models that differ in a width, a choice or an order share no cost that they should not."""
    for changes in ({}, {"attention": "gqa"}, {"d_model": "2560"}, {"max_positions": "512"}, {}):
        choice = Choice("deepseek_v2", {"n_layers": "2", **changes})
        decoder = compose(choice.composition, device="meta")
        counted, drawn = count_parameters(decoder), draw({"n_layers": "2", **changes})["totals"]
        totals = {name: figure["value"] for name, figure in drawn.items()}
        length = min(4096, choice.composition["max_positions"])
        assert (totals["active"], totals["parameters"]) == (counted.active, counted.total)
        assert totals["forward_flops"] == forward_flops_per_token(decoder, length)


REFUSED = [
    {"attention.n_heads": "abc"},
    {"attention.n_heads": "0"},
    {"attention": "gqa", "attention.n_heads": "7"},
    {"attention": "nothing"},
    {"attention.nothing": "1"},
    {"d_model": "null"},
    {"d_model": "1e999"},
    {"init.std": "nan"},
    {"gating": "null"},
    {"layout.ffn": "dense"},
    {"layout.ffn": "dense*1 (ffn"},
    {"ffn.shared": "nothing"},
    {"vocab_size": "10000000000000"},
]


@pytest.mark.slow
def test_a_refusal_is_the_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for changes in REFUSED:
        refused = draw(changes)
        words = Choice("deepseek_v2", changes).overrides
        assert run_command(command.run, ["describe", *words]) == 64
        assert capsys.readouterr().err == refused["refusal"]["text"] + "\n"
        assert "picture" not in refused and refused["refusal"]["remedy"], changes


def test_a_text_and_a_command_are_those_of_the_choice() -> None:
    copied = draw({"attention": "gqa"}, "tiny", "copy")
    assert copied["command"] == "blockwright train model=tiny model/attention=gqa"
    assert copied["yaml"].startswith("# tiny model/attention=gqa\n")


def test_forms_have_every_block_with_its_parameters() -> None:
    forms = answer({"what": "forms"})
    json.dumps(forms, allow_nan=False)
    assert set(forms["kinds"]["attention"]["blocks"]) == set(names("attention"))
    mla = forms["kinds"]["attention"]["blocks"]["mla"]
    assert mla["paper"] == "arXiv 2405.04434"
    by_name = {p["name"]: p for p in mla["parameters"]}
    assert by_name["n_heads"]["type"] == "int ≥ 1" and by_name["n_heads"]["default"] == 8 and by_name["n_heads"]["help"]
    assert by_name["position"]["child"] == "position" and by_name["q_lora_rank"]["optional"]
    assert {s["name"]: s["choices"] for s in forms["settings"]}["tie_embeddings"] == [True, False]
    assert forms["presets"][0]["summary"]


@pytest.mark.parametrize(("preset", "changes"), [("gpt_oss_20b", {}), ("llama3_1_8b", {"attention": "gated_delta"})])
def test_figures_are_written_as_in_the_picture(preset: str, changes: dict[str, str]) -> None:
    """Where a cache grows, where it stops at windows, and where it has the same size at any length."""
    drawn = draw({"n_layers": "2", **changes}, preset)
    for figure in drawn["totals"].values():
        assert f">{figure['text']}</text>" in drawn["picture"]
