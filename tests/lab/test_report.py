"""What a run shows: figures, curves, loads, a text; written, not empty, and whole after a resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from lab.report import RunReport, plot_expert_load, plot_losses, results_table
from training.run import run

Checked = Callable[..., dict[str, Any]]


def picture(path: Path) -> Any:
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 100 and image.shape[1] > 300
    return image[..., :3]


def is_drawn(path: Path) -> bool:
    """Whether more than a white sheet is on it."""
    return bool((picture(path) < 0.9).any(-1).mean() > 0.005)


@pytest.fixture
def plain(checked: Checked) -> Callable[..., dict[str, Any]]:
    return lambda *overrides: checked("logger=none", "trainer.max_steps=4", "trainer.val_check_interval=2", *overrides)


def test_run_is_shown_and_written(
    plain: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(plain())
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "completed" and results["steps"] == 4
    assert results["metrics"] == metrics
    assert results["parameters"] > results["active_parameters"] > 0 and results["fit_seconds"] > 0
    assert is_drawn(folder / "loss.png") and is_drawn(folder / "expert_load.png")
    assert (folder / "sample.txt").read_bytes() != b""
    said = capsys.readouterr().out
    assert "validation bits per byte" in said and f"{results['parameters']:,}" in said
    assert "sampled at temperature 0.8" in said and "results.json, expert_load.png, loss.png" in said


def test_dense_run_draws_no_experts_and_samples_nothing_when_told(
    plain: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(plain("model/ffn=gelu", "callbacks.report.sample_tokens=0"))
    folder = tmp_path / "run"
    assert is_drawn(folder / "loss.png")
    assert not (folder / "expert_load.png").exists() and not (folder / "sample.txt").exists()
    assert "busiest expert" not in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results["parameters"] == results["active_parameters"]


def test_attention_without_a_cache_is_reported_without_a_sample(
    plain: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from blocks.attention.base import Attention
    from blocks.attention.gqa import GQA

    monkeypatch.setattr(GQA, "new_cache", Attention.new_cache)
    run(plain("model/attention=gqa"))
    assert "no sampled text" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "completed"
    assert not (tmp_path / "run" / "sample.txt").exists()


def test_sample_is_as_long_as_the_model_allows(plain: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(plain("data/tokenizer=chars", "callbacks.report.sample_tokens=500"))
    text = (tmp_path / "run" / "sample.txt").read_text()
    assert 0 < len(text) <= 63  # model.max_positions is 64, and the first token starts the document


def test_curves_travel_in_the_checkpoint() -> None:
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


def test_curves_are_drawn_without_validations_too(tmp_path: Path) -> None:
    plot_losses([(1, 3.0), (2, 2.5), (3, 2.4)], [], tmp_path / "a.png")
    plot_losses([(1, 3.0)], [(1, 2.9), (5, float("nan"))], tmp_path / "b.png")
    assert is_drawn(tmp_path / "a.png") and is_drawn(tmp_path / "b.png")


def test_load_is_drawn_for_layers_of_different_width(tmp_path: Path) -> None:
    shares = {"1": torch.tensor([0.25] * 4), "5": torch.tensor([0.9] + [0.1 / 39] * 39)}
    plot_expert_load(shares, tmp_path / "load.png")
    assert is_drawn(tmp_path / "load.png")
    plot_expert_load({"0": torch.zeros(2)}, tmp_path / "none.png")  # nothing routed yet


def test_table_leaves_out_what_was_not_measured() -> None:
    results = {"parameters": 1000, "active_parameters": 600, "steps": 3, "fit_seconds": 1.5}
    table = results_table({**results, "metrics": {"val/loss": 1.25, "val_load/layer1/max_violation": 0.5}})
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["parameters", "optimizer steps", "validation loss", "busiest expert over the mean"]
    assert cells[1] == ["1,000", "3", "1.25", "1.5"]
