"""What a run shows: figures, curves, loads, a text; written, not empty, and whole after a resumption."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.grouped import GQA
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes, forward_flops_per_token
from blockwright.lab import run_report
from blockwright.lab.report.single import expert_load, losses
from blockwright.lab.report.svg import standalone
from blockwright.lab.run_report import RunReport, table_of
from blockwright.training.entry.execute import execute
from blockwright.training.figure import OF_TEXT, by_name
from blockwright.training.result import Interrupted, Result
from blockwright.training.tasks.causal_lm import CausalLM


def drawn(path):
    """The tooltips of what a chart shows, and the classes of its lines."""
    elements = list(ElementTree.parse(path).iter())
    lines = [e.get("class", "") for e in elements if e.tag.endswith("path")]
    return lines + [e.text or "" for e in elements if e.tag.endswith("title")]


@pytest.fixture
def plain(checked):
    return lambda *overrides: checked("logger=none", "trainer.max_steps=4", "trainer.val_check_interval=2", *overrides)


def test_run_is_shown_and_written(plain, tmp_path, capsys):
    metrics = execute(plain())
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "completed" and results["steps"] == 4
    assert results["metrics"] == metrics
    assert results["parameters"] > results["active_parameters"] > 0 and results["fit_seconds"] > 0
    assert 0 < results["save_seconds"] < results["fit_seconds"]
    assert {"curve s8", "curve s1"} <= set(drawn(folder / "loss.svg"))
    assert any(tip.startswith("layer 1, expert 0:") for tip in drawn(folder / "expert_load.svg"))
    assert (folder / "sample.txt").read_bytes() != b""
    said = capsys.readouterr().out
    assert "validation bits per byte" in said and f"{results['parameters']:,}" in said
    assert (
        "sampled at temperature 0.8" in said
        and "results.json, curves.json, expert_load.svg, loss.svg, model.svg" in said
    )
    assert {"attention mla", "layer 0"} <= {tip.partition(":")[0] for tip in drawn(folder / "model.svg")}


@pytest.mark.slow
def test_dense_run_draws_no_experts_and_samples_nothing_when_told(plain, tmp_path, capsys):
    execute(plain("model/ffn=gelu", "callbacks.report.sample_tokens=0"))
    folder = tmp_path / "run"
    assert "curve s8" in drawn(folder / "loss.svg")
    assert not (folder / "expert_load.svg").exists() and not (folder / "sample.txt").exists()
    assert "busiest expert" not in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results["parameters"] == results["active_parameters"]


@pytest.mark.slow
def test_attention_without_a_cache_is_reported_without_a_sample(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GQA, "new_cache", Attention.new_cache)
    execute(plain("model/attention=gqa"))
    assert "no sampled text" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "completed"
    assert not (tmp_path / "run" / "sample.txt").exists()


@pytest.mark.slow
def test_sample_is_as_long_as_the_model_allows(plain, tmp_path):
    execute(plain("data/tokenizer=chars", "callbacks.report.sample_tokens=500"))
    text = (tmp_path / "run" / "sample.txt").read_text()
    assert 0 < len(text) <= 63  # model.max_positions is 64, and the first token starts the document


def test_curves_travel_in_the_checkpoint():
    report = RunReport("x")
    report.train, report.val, report.seconds = [(1, 3.0), (2, 2.5)], [(2, 2.75)], 10.0
    state = report.state_dict()
    assert state["seconds"] >= 10
    again = RunReport("x")
    again.load_state_dict(state)
    assert (again.train, again.val) == (report.train, report.val)
    assert again.seconds == state["seconds"]
    again.train.append((3, 2.0))
    assert report.train == [(1, 3.0), (2, 2.5)]


def test_figure_of_the_whole_set_is_not_joined_to_the_curve_of_windows(tmp_path):
    (tmp_path / "loss.svg").write_text(standalone(losses([], [(1, 2.0), (2, 1.0)], [(2, 1.5)])))
    circles = [e.get("class") for e in ElementTree.parse(tmp_path / "loss.svg").iter() if e.tag.endswith("circle")]
    assert circles == ["dot s1", "dot s1", "ring s1", "ring s1"]  # the last is of the legend
    (curve,) = (e for e in ElementTree.parse(tmp_path / "loss.svg").iter() if e.tag.endswith("path"))
    assert curve.get("d", "").count(",") == 2


def curves_of(folder):
    return json.loads((folder / "curves.json").read_text())


@pytest.mark.slow
def test_curves_hold_what_was_learnt_and_what_a_token_costs(plain, tmp_path):
    config = plain("trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=2")
    metrics = execute(config)
    found = curves_of(tmp_path / "run")
    data = config["data"]
    assert found["tokens_per_step"] == 2 * data["batch_size"] * data["sequence_length"]
    assert [step for step, _ in found["train"]] == [2, 4] and found["train"][-1][1] > 0
    assert found["val"] and found["val"][-1][1] > 0
    decoder = compose(config["model"], device="meta")
    assert found["flops_per_token"] == 3 * forward_flops_per_token(decoder, data["sequence_length"])
    held = cache_bytes(decoder, data["sequence_length"], torch.float32)
    assert found["cache_bytes_per_token"] == held / data["sequence_length"] > 0
    assert found["expert_load"] and all(sum(s) == pytest.approx(1, abs=1e-4) for s in found["expert_load"].values())
    assert metrics["val/loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("end", [RuntimeError("no"), Interrupted(None, 3, 15)], ids=["failed", "interrupted"])
def test_run_that_ends_before_its_time_leaves_what_it_had(plain, tmp_path, monkeypatch, end):
    start = CausalLM.on_train_batch_start

    def stop(self, batch, batch_idx):
        if batch_idx == 3:
            raise end
        start(self, batch, batch_idx)

    monkeypatch.setattr(CausalLM, "on_train_batch_start", stop)
    with pytest.raises(type(end)):
        execute(plain("trainer.log_every_n_steps=1", "model/ffn=gelu"))
    found = curves_of(tmp_path / "run")
    assert [step for step, _ in found["train"]] == [1, 2, 3] and [step for step, _ in found["val"]] == [2]
    assert found["flops_per_token"] > 0 and found["expert_load"] == {}


def test_block_that_cannot_be_measured_costs_no_run(monkeypatch, tiny):
    monkeypatch.setattr(GQA, "new_cache", Attention.new_cache)
    found = run_report.costs(tiny(), 32)
    assert found["flops_per_token"] and found["cache_bytes_per_token"] is None
    with pytest.warns(UserWarning, match="no costs in"):
        assert set(run_report.costs({"vocab_size": 1}, 32).values()) == {None}


def test_charts_of_few_points_and_of_layers_of_different_width_are_drawn(tmp_path):
    for name, chart in {
        "a": losses([(1, 3.0), (2, 2.5), (3, 2.4)], []),
        "b": losses([(1, 3.0)], [(1, 2.9), (5, float("nan"))]),
        "load": expert_load({"1": [0.25] * 4, "5": [0.9] + [0.1 / 39] * 39}),
    }.items():
        (tmp_path / f"{name}.svg").write_text(standalone(chart))
    assert drawn(tmp_path / "a.svg") == ["curve s8", "Loss over optimizer steps", "training", "training"]
    assert {"step 1: 2.9000", "step 1: 3.0000"} <= set(drawn(tmp_path / "b.svg"))
    assert "nan" not in (tmp_path / "b.svg").read_text()
    assert "layer 5, expert 0: 36.00 of the even load" in drawn(tmp_path / "load.svg")
    expert_load({"0": [0.0, 0.0]})  # nothing routed yet


def test_table_has_what_was_measured_and_says_what_nothing_declares():
    run = Result("completed", parameters=1000, active_parameters=600, steps=3, fit_seconds=1.5)
    metrics = {"val/loss": 1.25, "val_load/layer1/max_violation": 0.5}
    table = table_of(replace(run, metrics=metrics, figures=by_name(metrics, OF_TEXT)))
    assert list(table.columns[1].cells) == ["1,000", "3", "1.25", "1.5"]
    table = table_of(replace(run, metrics={"val/f1": 0.5}))
    assert [list(column.cells)[2] for column in table.columns] == ["validation f1", "0.5", "", "not declared"]
