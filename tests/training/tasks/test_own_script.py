"""A task in a script of your own, with a plain loader: the page's snippet, and batches that are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from blockwright.registry import ConfigError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "lightning.md"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names of the page's snippet, after it has run."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names


def test_the_snippet_of_the_page_trains(script: dict[str, Any]) -> None:
    assert script["trainer"].global_step == 4 and script["logits"].shape == (16, 32, 256)


@pytest.mark.parametrize("lacking", ["a mapping", "tokens", "targets", "n_bytes"])
def test_a_batch_that_the_task_cannot_read_is_refused(lacking: str, script: dict[str, Any]) -> None:
    items: list[Any] = [{key: value for key, value in item.items() if key != lacking} for item in script["items"]]
    if lacking == "a mapping":
        items = [item["tokens"] for item in items]
    task = script["CausalLM"](script["task"].configured)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    with pytest.raises(ConfigError, match=lacking) as refusal:
        trainer.fit(task, DataLoader(items, batch_size=4))
    assert refusal.value.value == "list" and torch.is_tensor(items[0]) == (lacking == "a mapping")
