"""From demonstrations that disagree to the answers that a reward wants, as a user would: minutes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_reward_decides_between_what_demonstrations_left_open(train_py: Callable[..., Any], tmp_path: Path) -> None:
    """Before, 25 to 50 %; 30 steps later, 75 % sampled and 85 % greedy. The first update goes where it should."""

    def newest(pattern: str) -> Path:
        return max((tmp_path / "logs" / "grpo_sort" / "runs").glob(pattern), key=lambda file: file.stat().st_mtime)

    common = [f"paths.root_dir={tmp_path}", "test=false"]
    assert train_py("experiment=sft_sort", *common).returncode == 0
    (run,) = (tmp_path / "logs" / "sft_sort" / "runs").iterdir()
    aligned = ["experiment=grpo_sort", f"init_from={run}", *common]
    assert train_py(*aligned, "train=false").returncode == 0
    before = json.loads(newest("*/results.json").read_text())["metrics"]
    assert train_py(*aligned, "trainer.max_steps=30", "trainer.val_check_interval=30").returncode == 0
    after = json.loads(newest("*/results.json").read_text())["metrics"]
    first = next(row for row in csv.DictReader(newest("*/csv/**/metrics.csv").open()) if row.get("train/rise_positive"))
    assert 0.25 <= before["val/reward"] <= 0.5
    assert after["val/reward"] >= 0.75 and after["val/greedy"] >= 0.85
    assert float(first["train/rise_positive"]) > 0 > float(first["train/rise_negative"])
