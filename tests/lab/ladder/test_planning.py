"""Ladders as planned: sizes, matched arms, durations; and what is refused before a file is written."""

import functools
import json
import math
from dataclasses import replace
from importlib.metadata import EntryPoint

import ladder_folder
import pytest
import yaml

from blockwright.lab.ablation import planning as ablation
from blockwright.lab.ladder import definition, planning
from blockwright.lab.ladder.__main__ import main
from blockwright.lab.ladder.design import outline_of
from blockwright.registry import REFUSED, ConfigError, plugins
from blockwright.registry.command import run_command
from blockwright.training.configuration.composing import compose_config

SMALL = [
    "model=tiny", "model.n_layers=1", "model/ffn=swiglu", "model.layout.ffn=ffn*", "model/attention=mha",
    "model.attention.n_heads=2", "data=sorting", "test=false", "callbacks.report.sample_tokens=0", "logger=none",
]  # fmt: skip
MINE = {
    "about": "a claim",
    "base": SMALL,
    "baseline": "plain",
    "arms": {"plain": [], "gelu": "model/ffn=gelu"},
    "budget": {"match": "params", "by": "d_ff", "tol": 0.05},
    "sizes": {"d_model": [16, 32]},
    "tokens": [16000, 48000],
    "tune": None,
}


@functools.cache
def composed(overrides, output_dir):
    return compose_config(overrides, output_dir=output_dir)


@pytest.fixture(autouse=True, scope="module")
def compose_once():
    """To compose takes longest: what plans have in common is composed for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (ablation, planning):
            patch.setattr(module, "compose_config", lambda o, output_dir=None: composed(tuple(o), output_dir))
        yield


@pytest.fixture
def write(tmp_path):
    """The path of a definition with these keys; one that is … is left out."""

    def make(**keys):
        file = tmp_path / "mine.yaml"
        written = {k: v for k, v in {**MINE, **keys}.items() if v is not ...}
        file.write_text(yaml.safe_dump(written, sort_keys=False))
        return str(file)

    return make


@pytest.fixture(scope="module")
def written(compose_once, tmp_path_factory):
    """The plan that the command writes of ``MINE``."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "mine.yaml").write_text(yaml.safe_dump(MINE, sort_keys=False))
    assert main([str(folder / "mine.yaml"), "seeds=2", f"paths.log_dir={folder}", "--plan-only"]) == 0
    (file,) = folder.glob("ladder/mine/*/plan.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_arms_are_matched_at_every_size_and_tokens_are_the_same(written):
    outline, jobs = outline_of(written), written["jobs"]
    assert written["kind"] == "ladder" and outline.seeds == (0, 1) and list(outline.sizes) == ["16", "32"]
    for name, size in outline.sizes.items():
        plain, gelu = size.arms["plain"], size.arms["gelu"]
        assert gelu.parameters == pytest.approx(plain.parameters, rel=0.05)
        assert f"model.d_model={name}" in plain.overrides
        assert size.steps == {"16000 tokens": 14, "48000 tokens": 42}
    assert outline.tokens_per_step == 1152
    assert len(jobs) == 2 * 2 * 2 * 2 and not any("trainer.max_steps=1000" in job["overrides"] for job in jobs)


@pytest.mark.slow
def test_durations_are_tokens_per_parameter_of_the_baseline(write):
    plan = planning.make(definition.read(write(tokens=...), {"durations": "[10,20]"}))
    for size in plan.outline.sizes.values():
        steps = [round(ratio * size.arms["plain"].parameters / 1152) for ratio in (10, 20)]
        assert list(size.steps.values()) == steps


@pytest.mark.slow
def test_the_composed_rate_is_the_middle_of_the_tries(write):
    plan = planning.make(definition.read(write(tune={"optimizer.lr": 3}, tune_sizes=1)))
    values = dict.fromkeys(job["tries"]["optimizer.lr"] for job in plan.jobs)
    assert [*values] == pytest.approx([0.005, 0.01, 0.02])
    assert {job["size"] for job in plan.jobs} == {"16"}


def test_what_a_ladder_sees_shrinks_with_seeds_and_span_and_grows_with_tuning():
    few, more, wide = (
        ladder_folder.outline({"a": (1, 1), "b": (1, 1)}, seeds=s, sizes=n) for s, n in ((2, 4), (6, 4), (2, 6))
    )
    assert 1.03 < planning.sees(more) < planning.sees(few) < 1.2
    assert planning.sees(wide) < planning.sees(few)
    assert planning.sees(ladder_folder.outline({"a": (1, 1), "b": (1, 1)}, seeds=1, sizes=3)) == math.inf
    composed = ladder_folder.outline({"a": (1, 1), "b": (1, 1)}, sizes=4)
    tuned = replace(composed, tune="optimizer.lr", tuned_sizes=tuple(composed.sizes)[:2])
    assert planning.sees(composed) + 0.001 < planning.sees(tuned) < math.inf


def test_a_plug_in_offers_ladders(tmp_path, monkeypatch):
    folder = tmp_path / "offered_ladders"
    folder.mkdir()
    (folder / "theirs.yaml").write_text(yaml.safe_dump(MINE))
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("x", folder.name, definition.ENTRY_POINTS)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == definition.ENTRY_POINTS else [])
    assert "theirs" in definition.FILES.names() and definition.read("theirs").arms.about == "a claim"


def test_shipped_ladders_are_read():
    for name in definition.FILES.names():
        ladder = definition.read(name)
        assert len(ladder.sizes) >= 3 and ladder.arms.about and len(ladder.lengths) >= 2


FROM = {"overrides": "model/ffn=gelu", "init_from": "plain"}
MISTAKES = [  # keys of the file, words of the command line → path
    ({"durations": [20], "tokens": ...}, "", "durations"),
    ({"tokens": [48000]}, "", "tokens"),
    ({"tokens": [48000, 16000]}, "", "tokens"),
    ({"tokens": ...}, "", "durations"),
    ({"durations": [5, 10]}, "", "durations"),
    ({"sizes": {"d_model": [16]}}, "", "sizes"),
    ({"sizes": {}}, "", "sizes"),
    ({"sizes": {"d_model": [16, 32], "n_layers": [1, 2, 3]}}, "", "sizes"),
    ({"sizes": {"d_model": [16, 16]}}, "", "sizes"),
    ({"sizes": ...}, "", "sizes"),
    ({"baseline": "plane"}, "", "baseline"),
    ({}, "baseline=gelo", "baseline"),
    ({"arms": {"plain": []}}, "", "arms"),
    ({"arms": {"plain": [], "gelu": FROM}}, "", "arms.gelu"),
    ({"lr": [0.1, 0.2]}, "", "lr"),
    ({"tune": {"optimizer.lr": 1}}, "", "tune"),
    ({"tune": {"optimizer.lr": 5, "model.init.std": 5}}, "", "tune"),
    ({}, "decay=1.5", "decay"),
    ({}, "seeds=0", "seeds"),
    ({}, "tune_sizes=9", "tune_sizes"),
    ({}, "scheduler=constant", "scheduler"),
    ({}, "trainer.max_steps=7", "trainer.max_steps"),
    ({}, "seed=7", "seed"),
    ({}, "sizes.d_model=8", "sizes.d_model"),
    ({}, "--at 1e9", "--at"),
]
COMPOSED = [  # those that are seen when arms are composed
    ({"tokens": [100, 48000]}, "", "tokens"),
    ({"sizes": {"d_model": [32, 16]}}, "", "sizes"),
    ({"arms": {"plain": [], "gelu": "model/ffn=geluu"}}, "", "size 16: arm gelu: model/ffn"),
    ({"metric": "val/los"}, "", "size 16: metric"),
]


@pytest.mark.parametrize(
    ("keys", "words", "path"), [*MISTAKES, *(pytest.param(*each, marks=pytest.mark.slow) for each in COMPOSED)]
)
def test_a_mistake_is_one_message(write, tmp_path, keys, words, path):
    with pytest.raises(ConfigError) as refused:
        main([write(**keys), f"paths.log_dir={tmp_path}", "--plan-only", *words.split()])
    assert refused.value.path == path and refused.value.remedy
    assert not (tmp_path / "ladder").exists()


def test_list_and_no_ladder_of_this_name(capsys):
    assert main([]) == 0 and "attention" in capsys.readouterr().out
    for arguments in (["atention"], ["--plan-only"]):
        assert run_command(main, arguments) == REFUSED
        assert "attention" in capsys.readouterr().err
