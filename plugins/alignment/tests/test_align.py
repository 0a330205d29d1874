"""From demonstrations that disagree to the answers that a reward wants, as a user would: minutes."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def figures(root: Path, name: str) -> dict[str, float]:
    newest = max((root / "logs" / name / "runs").glob("*/results.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_reward_decides_between_what_demonstrations_left_open(train_py: Run, tmp_path: Path, seed: int) -> None:
    """Before, 25 to 50 %; after, 80 % sampled and 90 % of the likeliest. The first update goes where it should."""
    common = [f"paths.root_dir={tmp_path}", f"seed={seed}", "test=false"]
    assert train_py("experiment=sft_sort", *common).returncode == 0
    (run,) = (tmp_path / "logs" / "sft_sort" / "runs").iterdir()
    aligned = ["experiment=grpo_sort", f"init_from={run}", *common]
    assert train_py(*aligned, "train=false").returncode == 0
    before = figures(tmp_path, "grpo_sort")
    assert train_py(*aligned).returncode == 0
    after = figures(tmp_path, "grpo_sort")
    newest = max((tmp_path / "logs" / "grpo_sort").glob("runs/*/csv/**/metrics.csv"), key=lambda f: f.stat().st_mtime)
    first = next(row for row in csv.DictReader(newest.open()) if row.get("train/rise_positive"))
    rises = float(first["train/rise_positive"]), float(first["train/rise_negative"])
    print(f"seed {seed}: {before['val/reward']:.3f} {before['val/greedy']:.3f}", after, rises)
    assert 0.25 <= before["val/reward"] <= 0.5
    assert after["val/reward"] >= 0.8 and after["val/greedy"] >= 0.9
    assert rises[0] > 0 > rises[1]
