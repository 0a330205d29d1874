"""A task of your own: a plug-in's of ten lines is trained and resumed like ours, and a script reads a plain loader."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from blockwright import registry
from blockwright.registry import ConfigError
from blockwright.training.entry.execute import execute

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = ROOT / "tests" / "plugin"
OWN = ["task=previous_token"]


@pytest.fixture
def own(monkeypatch, checked, temporary_blocks):
    monkeypatch.syspath_prepend(str(PLUGIN))
    from blockwright_guest.previous_token import PreviousToken

    registry.register("task", "previous_token")(PreviousToken)  # by another test's import it may be, and be gone
    return lambda *overrides: checked(*OWN, "logger=csv", "callbacks.report.sample_tokens=0", *overrides)


@pytest.mark.slow
def test_it_trains_logs_resumes_and_is_reported(own: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    whole = execute(own("trainer.max_steps=6"))
    rows = [row for row in csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()) if row.get("train/loss")]
    assert len(rows) == 6 and float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "completed" and results["metrics"]["val/loss"] == whole["val/loss"] > 0
    assert (tmp_path / "run" / "loss.svg").exists()
    on = execute(own("trainer.max_steps=8", f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"))
    assert on["val/loss"] < whole["val/loss"]


@pytest.mark.slow
def test_key_that_it_reads_and_the_data_do_not_give_is_refused(own, monkeypatch):
    from blockwright_guest.previous_token import PreviousToken

    monkeypatch.setattr(PreviousToken, "reads", ("tokens", "labels"))
    with pytest.raises(ConfigError, match="gives batches without labels, and PreviousToken reads"):
        execute(own("trainer.max_steps=1"))


def test_page_on_adding_a_task_shows_this_one() -> None:
    page = (ROOT / "docs" / "how-to" / "add-a-task.md").read_text()
    code = re.search(r"```python\n# .*?\n(.*?)```", page, re.S)
    assert code and (PLUGIN / "blockwright_guest" / "previous_token.py").read_text().endswith(code[1])


@pytest.mark.slow
def test_it_is_trained_on_several_ranks_as_on_one(train_py, small, tmp_path):
    info = tmp_path / "site" / "own-0.dist-info"  # as an installer leaves it
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 0\n")
    points = "[blockwright.blocks]\nprevious_token = blockwright_guest.previous_token\n"
    (info / "entry_points.txt").write_text(points)
    (info.parent / "blockwright_guest").symlink_to(PLUGIN / "blockwright_guest")
    losses = []
    for where in ("default", "[fsdp,sim]"):
        folder = tmp_path / where
        quiet = ["logger=none", "callbacks.report.sample_tokens=0", f"hydra.run.dir='{folder}'", "data.batch_size=4"]
        done = train_py(*small, *OWN, *quiet, f"trainer={where}", "trainer.max_steps=4", PYTHONPATH=str(info.parent))
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((folder / "results.json").read_text())["metrics"]["val/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "lightning.md"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names of the page's snippets, after they have run."""
    names: dict[str, Any] = {}
    exec("".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)), names)
    return names


def test_the_snippet_of_the_page_trains(script: dict[str, Any]) -> None:
    assert script["trainer"].global_step == 4 and script["logits"].shape == (16, 32, 256)
    assert script["loss"].isfinite() and not any(p.grad is not None for p in script["decoder"].parameters())


def test_a_batch_that_the_task_cannot_read_is_refused(script: dict[str, Any]) -> None:
    items = script["items"]
    lacking = {key: [{k: v for k, v in item.items() if k != key} for item in items] for key in items[0]}
    for name, batches in {**lacking, "a mapping": [item["tokens"] for item in items]}.items():
        task = script["CausalLM"](script["task"].configured)
        trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        with pytest.raises(ConfigError, match=name):
            trainer.fit(task, DataLoader(batches, batch_size=4))


@pytest.mark.parametrize(("key", "odd"), [("targets", -1), ("targets", 256), ("tokens", 256), ("tokens", -100)])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_an_id_that_the_vocabulary_has_not_is_refused(script: dict[str, Any], key: str, odd: int, stage: str) -> None:
    items = [{**item, key: item[key].clone().index_fill_(0, torch.tensor(3), odd)} for item in script["items"]]
    task = script["CausalLM"](script["task"].configured)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    with pytest.raises(ConfigError, match=rf"the {key[:-1]} {odd}, and ids of this model are 0 to 255"):
        getattr(trainer, stage)(task, DataLoader(items, batch_size=4))
