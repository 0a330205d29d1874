"""Class paths that run folders of before 2026-12-01 contain, and where these classes are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEDULES = ("constant.Constant", "warmup_cosine.WarmupCosine", "warmup_stable_decay.WarmupStableDecay")
MOVED = {
    f"blockwright.training.schedulers.{path}": f"blockwright.training.schedulers.{path.partition('.')[2]}"
    for path in (*SCHEDULES, "warmup_step_decay.WarmupStepDecay")
}


def with_moved(value: Any) -> Any:
    """Plain values with the current path of every class that has moved."""
    if isinstance(value, Mapping):
        return {k: _moved(v) if k in ("_target_", "class_path") else with_moved(v) for k, v in value.items()}
    return [with_moved(inner) for inner in value] if isinstance(value, list) else value


def _moved(dotted: Any) -> Any:
    return MOVED.get(dotted, dotted) if isinstance(dotted, str) else dotted
