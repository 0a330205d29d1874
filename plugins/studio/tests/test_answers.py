"""Answers: pictures with true numbers, and refusals in the words of the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blockwright import command
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import count_parameters, forward_flops_per_token
from blockwright.plugins.studio.answers import answer
from blockwright.plugins.studio.choice import Choice
from blockwright.registry import names
from blockwright.registry.command import run_command


def draw(changes: dict[str, str], of: str = "deepseek_v2", what: str = "draw") -> dict[str, Any]:
    given = answer({"what": what, "preset": of, "changes": changes})
    assert json.loads(json.dumps(given, allow_nan=False)) == given
    return given


def test_a_picture_has_the_costs_of_the_model_and_a_place_for_each_of_its_blocks() -> None:
    drawn = draw({"attention": "gqa"})
    decoder = compose(preset("deepseek_v2", {"attention": {"name": "gqa"}}), device="meta")
    counted = count_parameters(decoder)
    assert (drawn["totals"]["parameters"]["value"], drawn["totals"]["active"]["value"]) == (
        counted.total,
        counted.active,
    )
    assert drawn["model"]["attention"] == {"name": "gqa"} and "refusal" not in drawn
    places = drawn["boxes"]
    assert places["layers.0.ffn"] == "variants.ffn.dense" and places["layers.1.ffn"] == "ffn"
    assert places["layers.0.attention.position"] == "position"  # the model's own
    assert (
        places["layers.1.ffn.shared"] == "ffn.shared" and places["layers.1.ffn.gating.balance.2"] == "gating.balance.2"
    )
    shown = {place for path, place in places.items() if f'data-path="{path}"' in drawn["picture"]}
    blocks = {"attention", "ffn", "variants.ffn.dense", "ffn.shared", "gating", "gating.balance.0", "experts"}
    assert shown >= {*blocks, "norm", "position", "d_model", "vocab_size"}


def test_costs_that_are_remembered_are_those_that_are_measured() -> None:
    """Models that differ in a width, a choice or an order share no cost that they should not."""
    for changes in ({}, {"attention": "gqa"}, {"d_model": "2560"}, {"max_positions": "512"}, {}):
        choice = Choice("deepseek_v2", {"n_layers": "3", **changes})
        decoder = compose(choice.composition, device="meta")
        counted, drawn = count_parameters(decoder), draw({"n_layers": "3", **changes})["totals"]
        totals = {name: figure["value"] for name, figure in drawn.items()}
        length = min(4096, choice.composition["max_positions"])
        assert totals["active"] == counted.active and totals["parameters"] == counted.total
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


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("gpt_oss_20b", {}), ("llama3_1_8b", {"attention": "gated_delta"})],
)
def test_figures_are_written_as_in_the_picture(preset: str, changes: dict[str, str]) -> None:
    """Where a cache grows, where it stops at windows, and where it has the same size at any length."""
    drawn = draw(changes, preset)
    for figure in drawn["totals"].values():
        assert f">{figure['text']}</text>" in drawn["picture"]
