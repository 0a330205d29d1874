"""Checkpoints as small as they can be: what they say about their run, and no weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from blockwright.training.checkpoints.atomic import write_file
from blockwright.training.checkpoints.record import KEY
from blockwright.training.configuration.run import Run

OURS = {
    "seed": 0,
    "init_from": None,
    "model": {"d_model": 64, "position": {"name": "rope", "theta": 10000.0}, "gating": {"name": "hash", "top_k": 2}},
    "optimizer": {"_target_": "blockwright.training.optimizers.adamw.AdamW", "lr": 0.01},
    "scheduler": {
        "_target_": "blockwright.training.schedulers.WarmupCosine",
        "warmup": 1,
        "min_ratio": 0.1,
    },
    "data": {"sequence_length": 32},
    "task": {"z_loss": 0.0},
    "trainer": {"max_steps": 6},
}


@pytest.fixture
def ours() -> dict[str, Any]:
    """The record of a run."""
    return copy.deepcopy(OURS)


@pytest.fixture
def leave(ours: dict[str, Any]) -> Callable[..., Path]:
    """Writes a checkpoint of a run with this record, or with changes to it: dotted path → value."""

    def write(path: Path, changed: Mapping[str, Any] | None = None, age: int = 0, **more: Any) -> Path:
        settings = copy.deepcopy(ours)
        for dotted, value in (changed or {}).items():
            *parts, last = dotted.split(".")
            node = settings
            for part in parts:
                node = node[part]
            node[last] = value
        write_file({KEY: settings, "global_step": 4, **more}, path)
        os.utime(path, (1e9 - age, 1e9 - age))
        return path

    return write


@pytest.fixture
def at(ours: dict[str, Any], tmp_path: Path) -> Callable[..., Run]:
    """Makes a run in a folder, with the record of ``ours``."""

    def make(run: str = "logs/mine/runs/now", dirpath: Path | None = None, **changes: Any) -> Run:
        paths = {"log_dir": str(tmp_path / "logs"), "output_dir": str(tmp_path / run)}
        keeper = {"dirpath": str(dirpath or tmp_path / run / "checkpoints"), "filename": "best"}
        asked = {"ckpt_path": None, "auto_resume": False, "train": True, "resume": {"changed": "show"}}
        parts = {**ours, "paths": paths, "task_name": "mine", "callbacks": {"checkpoint": keeper}}
        return Run.assemble({**copy.deepcopy(parts), **asked, **changes})

    return make
