"""The record of a run in its checkpoints: the settings that determine its numbers, as plain types.

Left out: settings that change no number of the training (paths, loggers, reports, workers, kernels, devices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blocks.checkpoint.sharded import is_folder, read_meta
from blocks.model_config import reread
from training.configuration.renamed import with_moved

KEY = "configuration"  # of a checkpoint
PARTS = ("seed", "init_from", "model", "optimizer", "scheduler", "data", "task", "trainer")
NOT_OF_DATA = ("num_workers", "eval_batch_size", "eval_windows", "cache_dir")
NOT_OF_TASK = (
    *("model", "optimizer", "scheduler", "seed", "init_from"),  # recorded separately
    *("kernels", "compile", "activation_checkpointing"),
)
OF_TRAINER: dict[str, Any] = {  # argument → default
    "max_steps": -1,
    "max_epochs": None,
    "accumulate_grad_batches": 1,
    "precision": "32-true",
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "limit_train_batches": None,
    "overfit_batches": 0.0,
}


def record(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that determine the numbers of the training.

    Args:
        plain: the result of ``preflight`` or of ``from_cli``, without secrets
    """
    found = {part: _listed(plain.get(part)) for part in PARTS}
    data, task, trainer = (dict(found[part] or {}) for part in ("data", "task", "trainer"))
    drop = (*NOT_OF_DATA, "seed") if data.get("seed") == found["seed"] else NOT_OF_DATA
    found["data"] = {key: value for key, value in data.items() if key not in drop}
    found["task"] = {key: value for key, value in task.items() if key not in NOT_OF_TASK}
    given = {key: trainer.get(key) for key in OF_TRAINER}
    found["trainer"] = {key: OF_TRAINER[key] if value is None else value for key, value in given.items()}
    return found


def _listed(value: Any) -> Any:
    """Tuples as lists: one command line gives tuples, the other lists."""
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def from_cli(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of Lightning CLI in the shape of ``preflight``'s, as far as ``record`` uses it."""
    task, data = _node(settings["model"]), _node(settings["data"])
    own = {key: task.get(key) for key in ("optimizer", "scheduler", "init_from")}
    own["model"] = reread(task.get("model"))  # a file may hold an older format
    return {**own, "seed": settings["seed_everything"], "data": data, "task": task, "trainer": settings["trainer"]}


def _node(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_node(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    inner = {key: _node(below) for key, below in value.items()}
    return {"_target_": inner["class_path"], **(inner.get("init_args") or {})} if "class_path" in inner else inner


@dataclass(frozen=True)
class Past:
    """What is known about the run that wrote a checkpoint.

    Args:
        settings: its record; the model and the seed alone if the checkpoint has none
        complete: whether the checkpoint has a record
        step: optimizer steps done
        rate: learning rate of the next step under its schedule, as a fraction of the peak; None if unknown
    """

    settings: dict[str, Any]
    complete: bool
    step: int
    rate: float | None


def past_of(checkpoint: Mapping[str, Any]) -> Past:
    """Read the record of the run that wrote a checkpoint."""
    settings = checkpoint.get(KEY)
    complete = isinstance(settings, dict) and set(PARTS) <= set(settings)
    if not complete:
        known = checkpoint.get("hyper_parameters")
        settings = {key: known[key] for key in ("model", "seed") if key in known} if isinstance(known, dict) else {}
    if "model" in settings:  # type: ignore[operator] # a mapping by now
        settings = {**settings, "model": reread(settings["model"])}  # type: ignore[dict-item, index]
    step = checkpoint.get("global_step")
    return Past(
        with_moved(settings), complete, step if isinstance(step, int) else 0, _rate(checkpoint.get("lr_schedulers"))
    )


def _rate(schedulers: Any) -> float | None:
    try:
        state = schedulers[0]
        return float(state["_last_lr"][0]) / float(state["base_lrs"][0])
    except (TypeError, KeyError, IndexError, ValueError, ZeroDivisionError):
        return None


def peek(path: Path) -> Past | None:
    """The record of a checkpoint, read without its tensors and without verifying it; None if unreadable."""
    try:
        found = read_meta(path) if is_folder(path) else torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises several classes for a truncated, foreign or hostile file
        return None
    return past_of(found) if isinstance(found, dict) else None
