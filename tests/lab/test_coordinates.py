"""``blockwright coordinates``: slopes of standard parametrisation, of rules, and of rules with a planted fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockwright.blocks import widths
from blockwright.blocks.scale import Scale
from blockwright.lab.coordinates import Settings, check, is_beyond, main

DENSE = ["model.layout=null", "model.variants=null", "model/attention=mha", "model/ffn=swiglu", "model.n_layers=2"]
KDA = [*DENSE[:2], "model/attention=kda", *DENSE[3:]]
MLA = ["model.n_layers=2", "model.attention.qk_nope_head_dim=16", "model.attention.qk_rope_head_dim=8"]
MLA = [*MLA, "model.attention.v_head_dim=16"]
ADAMW = ["optimizer=adamw", "optimizer.lr=3e-3"]
RULES = "parametrisation=width"
HEADS = {"n_heads": 4}
GROW: dict[str, Any] = {"attention": HEADS, "ffn": {"d_ff": 256}}
LOW_RANK = {"decay": {"rank": 16}, "output_gate": {"rank": 16}}
OF_MLA: dict[str, Any] = {
    "attention": {**HEADS, "kv_lora_rank": 64},
    "ffn": {"shared": {"d_ff": 64}},
    "experts": {"d_ff": 32},
    "variants": {"ffn": {"dense": {"d_ff": 256}}},
}


def changes(overrides: list[str], grow: dict[str, Any] = GROW, rules: bool = True, **more: Any) -> dict[str, float]:
    """Kind of activation → slope of its change."""
    settings = Settings(**{"widths": [64, 128, 256], "grow": grow, "seeds": 2, **more})
    return {kind: slope.change for kind, slope in check(overrides, settings, rules).items()}


def beyond(found: dict[str, float]) -> dict[str, float]:
    return {kind: change for kind, change in found.items() if is_beyond(kind, change)}


@pytest.mark.slow
def test_standard_parametrisation_grows_with_the_width() -> None:
    found = changes(DENSE, rules=False, widths=[64, 128])
    assert found["layers.*.ffn.down"] > 1
    assert found["layers.*.attention.query"] > 0.3
    assert found["logits"] > 0.3


@pytest.mark.slow
def test_rules_keep_changes_of_a_dense_model() -> None:
    assert not beyond(changes([*DENSE, RULES], widths=[64, 256], seeds=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "grow", "optimizer"),
    [
        (DENSE, GROW, ADAMW),
        (DENSE, GROW, []),
        (MLA, OF_MLA, []),
        (KDA, {**GROW, "attention": {**HEADS, **LOW_RANK}}, ADAMW),
        ([*DENSE, "model.tie_embeddings=true"], GROW, []),
    ],
    ids=["dense", "dense_muon", "mla_moe", "kda", "tied"],
)
def test_rules_keep_changes_of_every_architecture(model: list[str], grow: dict[str, Any], optimizer: list[str]) -> None:
    # Of two seeds and up to 256 a slope of kda is noise of more than is allowed.
    more: dict[str, Any] = {"widths": [64, 128, 256, 512], "seeds": 4} if model is KDA else {}
    assert not beyond(changes([*model, *optimizer, RULES], grow, **more))


@pytest.mark.slow
@pytest.mark.parametrize(("std", "is_beyond"), [(0.02, True), (0.08, False)])
def test_the_ffn_behind_normalised_heads_keeps_its_change_unless_training_swamps_the_initial_values(
    std: float, is_beyond: bool
) -> None:
    script = "import blockwright_guest.retention, sys; from blockwright.lab.coordinates import main; sys.exit(main())"
    model = [*DENSE[:2], "model/attention=retention", *DENSE[3:], *ADAMW, RULES, f"model.init.std={std}"]
    command = [
        sys.executable,
        "-c",
        script,
        *model,
        "grow={attention: {n_heads: 4}, ffn: {d_ff: 256}}",
        "seeds=8",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "plugin")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode in (0, 1), ended.stderr
    assert ("layers.*.ffn" in json.loads(ended.stdout)["beyond"]) == is_beyond


@pytest.mark.slow
def test_a_map_without_its_factor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths.Grown, "scale", _forgetting(widths.Grown.scale, "ffn.down"))
    found = changes([*DENSE, *ADAMW, RULES], widths=[64, 128])
    assert found["layers.*.ffn.down"] > 0.5
    assert abs(found["layers.*.ffn.up"]) < 0.2


@pytest.mark.slow
def test_a_tied_head_that_is_not_divided_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def embedding_alone(*given: Any) -> Any:
        return [pair for pair in of_embedding(*given) if pair[0] == "embedding.weight"]

    of_embedding = widths._of_embedding
    monkeypatch.setattr(widths, "_of_embedding", embedding_alone)
    tied = [*DENSE, *ADAMW, "model.tie_embeddings=true", RULES]
    assert changes(tied, widths=[64, 128])["logits"] > 0.3


@pytest.mark.slow
def test_scores_of_wider_heads_without_their_factor_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, grow = [*DENSE, *ADAMW, RULES], {"ffn": {"d_ff": 256}}
    assert not beyond(changes(model, grow))
    monkeypatch.setattr(widths, "_of_queries", lambda *_: [])
    assert set(beyond(changes(model, grow))) == {"layers.*.attention.scores"}


def _forgetting(scale: Any, part: str) -> Any:
    """The factors, but for those of weights whose name has the part."""

    def forget(self: widths.Grown, step: Any) -> Scale:
        return Scale() if part in self.weight.names[0] else scale(self, step)

    return forget


@pytest.mark.slow
def test_command_prints_json_and_fails_beyond_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grow = "grow={attention: {n_heads: 4}, ffn: {d_ff: 256}}"
    command = [*DENSE, "widths=64,128", "seeds=1", "steps=1", grow, "--json"]
    assert main(command) == 0  # standard parametrisation is measured, not judged
    assert json.loads(capsys.readouterr().out)["slopes"]["layers.*.ffn.down"]["change"] > 1
    monkeypatch.setattr(widths.Grown, "scale", _forgetting(widths.Grown.scale, "attention"))
    assert main([*command, RULES]) == 1
    assert "layers.*.attention.query" in json.loads(capsys.readouterr().out)["beyond"]


@pytest.mark.slow
def test_command_names_the_sides_that_should_have_grown(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["widths=64,128", "seeds=2", "steps=2"]
    assert main([*MLA, *few, RULES, "grow={attention: {n_heads: 4}}"]) == 1
    said, _, sides = capsys.readouterr().out.splitlines()[-1].rpartition("}: ")
    assert "do not grow" in said and "layers.*.attention.kv_down.weight out" in sides and "query" not in sides


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["widths=64"], "widths"),
        (["widths=64,64"], "widths"),
        (["widths=64,100", "grow={attention: {n_heads: 4}}"], "grow.attention.n_heads"),
        (["grow={attention: {n_heads: four}}"], "grow.attention.n_heads"),
        (["steps=0"], "steps"),
        ([RULES, "parametrisation.bas=1"], "parametrisation.bas"),
        (["model=nothing"], "model"),
    ],
)
def test_mistakes_are_refused_before_anything_trains(
    words: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 64
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}"), message
    assert "remedy:" in message
