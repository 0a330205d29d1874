"""``blockwright coordinates``: slopes of standard parametrisation, of rules, and of rules with a planted fault."""

import json
import shlex
from pathlib import Path

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
GROW = {"attention": HEADS, "ffn": {"d_ff": 256}}
LOW_RANK = {"decay": {"rank": 16}, "output_gate": {"rank": 16}}
OF_MLA = {
    "attention": {**HEADS, "kv_lora_rank": 64},
    "ffn": {"shared": {"d_ff": 64}},
    "experts": {"d_ff": 32},
    "variants": {"ffn": {"dense": {"d_ff": 256}}},
}


def changes(overrides, grow=GROW, rules=True, **more):
    """Kind of activation → slope of its change."""
    settings = Settings(**{"widths": [64, 128, 256], "grow": grow, "seeds": 2, **more})
    return {kind: slope.change for kind, slope in check(overrides, settings, rules).items()}


def beyond(found):
    return {kind: change for kind, change in found.items() if is_beyond(kind, change)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "grow", "optimizer"),
    [
        (DENSE, GROW, ADAMW),
        (MLA, OF_MLA, []),
        (KDA, {**GROW, "attention": {**HEADS, **LOW_RANK}}, ADAMW),
        ([*DENSE, "model.tie_embeddings=true"], GROW, []),
    ],
    ids=["dense", "mla_moe", "kda", "tied"],
)
def test_rules_keep_changes_of_every_architecture(model, grow, optimizer):
    # Of two seeds and up to 256 a slope of kda is noise of more than is allowed.
    more = {"widths": [64, 128, 256, 512], "seeds": 4} if model is KDA else {}
    assert not beyond(changes([*model, *optimizer, RULES], grow, **more))


@pytest.mark.slow
def test_the_ffn_behind_normalised_heads_keeps_its_change_where_training_does_not_swamp_the_initial_values(
    warm, environment, tmp_path
):
    script = "import blockwright_guest.retention, sys; from blockwright.lab.coordinates import main; sys.exit(main())"
    model = [*DENSE[:2], "model/attention=retention", *DENSE[3:], *ADAMW, RULES, "model.init.std=0.08"]
    more = ["grow={attention: {n_heads: 4}, ffn: {d_ff: 256}}", "seeds=8", "--json"]
    there = {**environment, "PYTHONPATH": str(Path(__file__).parents[1] / "plugin")}
    ended = warm.run("-c", script, *model, *more, cwd=tmp_path, env=there)
    assert ended.returncode in (0, 1), ended.stderr
    assert "layers.*.ffn" not in json.loads(ended.stdout)["beyond"]


@pytest.mark.slow
def test_a_map_without_its_factor_is_seen(monkeypatch):
    monkeypatch.setattr(widths.Grown, "scale", _forgetting(widths.Grown.scale, "ffn.down"))
    found = changes([*DENSE, *ADAMW, RULES], widths=[64, 128])
    assert found["layers.*.ffn.down"] > 0.5
    assert abs(found["layers.*.ffn.up"]) < 0.2


@pytest.mark.slow
def test_a_tied_head_that_is_not_divided_is_seen(monkeypatch):
    def embedding_alone(*given):
        return [pair for pair in of_embedding(*given) if pair[0] == "embedding.weight"]

    of_embedding = widths._of_embedding
    monkeypatch.setattr(widths, "_of_embedding", embedding_alone)
    tied = [*DENSE, *ADAMW, "model.tie_embeddings=true", RULES]
    assert changes(tied, widths=[64, 128])["logits"] > 0.3


@pytest.mark.slow
def test_scores_of_wider_heads_without_their_factor_are_seen(monkeypatch):
    model, grow = [*DENSE, *ADAMW, RULES], {"ffn": {"d_ff": 256}}
    assert not beyond(changes(model, grow))
    monkeypatch.setattr(widths, "_of_queries", lambda *_: [])
    assert set(beyond(changes(model, grow))) == {"layers.*.attention.scores"}


def _forgetting(scale, part):
    """The factors, but for those of weights whose name has the part."""

    def forget(self, step):
        return Scale() if part in self.weight.names[0] else scale(self, step)

    return forget


@pytest.mark.slow
def test_command_prints_json_and_fails_beyond_the_tolerance(monkeypatch, capsys):
    grow = "grow={attention: {n_heads: 4}, ffn: {d_ff: 256}}"
    command = [*DENSE, "widths=64,128", "seeds=1", "steps=1", grow, "--json"]
    assert main(command) == 0  # standard parametrisation is measured, not judged
    assert json.loads(capsys.readouterr().out)["slopes"]["layers.*.ffn.down"]["change"] > 1
    monkeypatch.setattr(widths.Grown, "scale", _forgetting(widths.Grown.scale, "attention"))
    assert main([*command, RULES]) == 1
    assert "layers.*.attention.query" in json.loads(capsys.readouterr().out)["beyond"]


@pytest.mark.slow
def test_command_names_the_sides_that_should_have_grown(capsys):
    few = ["widths=64,128", "seeds=2", "steps=2"]
    assert main([*MLA, *few, RULES, "grow={attention: {n_heads: 4}}"]) == 1
    said, _, sides = capsys.readouterr().out.splitlines()[-1].rpartition("}: ")
    assert "do not grow" in said and "layers.*.attention.kv_down.weight out" in sides and "query" not in sides


MISTAKES = {
    "widths=64": "widths",
    "widths=64,64": "widths",
    "widths=64,100 'grow={attention: {n_heads: 4}}'": "grow.attention.n_heads",
    "'grow={attention: {n_heads: four}}'": "grow.attention.n_heads",
    "steps=0": "steps",
    f"{RULES} parametrisation.bas=1": "parametrisation.bas",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_refused_before_anything_trains(words, capsys):
    assert main(shlex.split(words)) == 64
    assert capsys.readouterr().err.startswith(f"error: {MISTAKES[words]}")
