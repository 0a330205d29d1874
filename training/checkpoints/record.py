"""The record of a run in its checkpoints: every setting that can change a weight or a figure, as it was given.

What is recorded is what is not left out, so a new setting is recorded by itself. Nothing that is found or settled later
(the checkpoint to resume from, folders) is recorded: the same command has the same record at every start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from blockwright.blocks.checkpoint.sharded import is_folder, read_meta
from blockwright.blocks.model_config import reread
from blockwright.renamed import with_moved
from blockwright.training.checkpoints.observing import why_left_out
from blockwright.training.configuration.class_paths import to_targets
from blockwright.training.configuration.run import STANDARD, Run

KEY = "configuration"  # of a checkpoint
_RUNS = "names or describes the run"
_STARTS = "chooses where to start; the run that it finds is compared by the other settings"
_FILES = "says where files are"
_SHOWS = "shows or watches what is computed"
_ROUNDING = "computes the same in another way, but for rounding"
_MEASURES = "chooses what is measured after training"
LEFT_OUT = {  # setting, or pattern of settings → why it changes no weight and no figure; callbacks: see observing.py
    "task_name": _RUNS,
    "tags": _RUNS,
    "ckpt_path": _STARTS,
    "auto_resume": _STARTS,
    "resume": _STARTS,
    "train": _MEASURES,
    "test": _MEASURES,
    "optimized_metric": "chooses the figure by which runs are compared",
    "logger": "says where figures go",
    "paths": _FILES,
    "extras": _SHOWS,
    "data.num_workers": "batches are a function of seed and step, whichever process reads them",
    "data.eval_batch_size": "a figure is a sum over a split, however that is divided",
    "data.cache_dir": _FILES,
    "task.kernels": _ROUNDING,
    "task.compile": _ROUNDING,
    "task.activation_checkpointing": _ROUNDING,
    "trainer.accelerator": _ROUNDING,
    "trainer.devices": "batches are of all processes, however many share them",
    "trainer.num_nodes": "batches are of all processes, however many share them",
    "trainer.strategy": "batches are of all processes, however they share model and data",
    "trainer.compile": _ROUNDING,
    "trainer.deterministic": _ROUNDING,
    "trainer.benchmark": _ROUNDING,
    "trainer.default_root_dir": _FILES,
    "trainer.logger": "says where figures go",
    "trainer.dry_run": "trains nothing",
    "trainer.world": "trains nothing",
    "trainer.enable_checkpointing": _FILES,
    "trainer.enable_progress_bar": _SHOWS,
    "trainer.enable_model_summary": _SHOWS,
    "trainer.enable_autolog_hparams": _SHOWS,
    "trainer.model_registry": _FILES,
    "trainer.profiler": _SHOWS,
    "trainer.detect_anomaly": _SHOWS,
    "trainer.barebones": _SHOWS,
    "trainer.limit_predict_batches": _MEASURES,
    "callbacks.*.directory": _FILES,
    "callbacks.Machine.keep_memory": "says where freed memory goes",
}
TRAINER = "lightning.pytorch.Trainer"  # named by no file of Lightning CLI


def record(run: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that can change a weight or a figure.

    Args:
        run: of either command line, without secrets

    Raises:
        ConfigError: a callback or a plugin cannot be imported
    """
    listed = _listed({key: value for key, value in run.items() if key not in LEFT_OUT})
    given = _without_folder(listed, (run.get("paths") or {}).get("output_dir"))
    for part in ("data", "task"):  # an interpolation of a setting at the root, which is recorded there
        given[part] = {k: v for k, v in (given.get(part) or {}).items() if k not in given or given[k] != v}
    if given.get("parametrisation") == STANDARD:
        del given["parametrisation"]  # as in the records of versions that had no other
    given["trainer"] = _trainer(given.get("trainer") or {})
    given["callbacks"] = _by_class(_changing((given.get("callbacks") or {}).values(), "callbacks"))
    return _kept(given)


def _without_folder(given: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """With a placeholder for the run's own folder, which is another at every start."""
    from blockwright.training.configuration.placeholders import portable  # it imports Lightning

    own: dict[str, Any] = portable(given, folder) if folder and Path(folder).is_absolute() else given
    return own


def _kept(node: Any, path: str = "") -> Any:
    if isinstance(node, list):
        return [_kept(inner, f"{path}{i}.") for i, inner in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    kept = {key: inner for key, inner in node.items() if not _is_left_out(f"{path}{key}")}
    return {key: _kept(inner, f"{path}{key}.") for key, inner in kept.items()}


def _is_left_out(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in LEFT_OUT)


def _trainer(node: Mapping[str, Any]) -> dict[str, Any]:
    plugins = node.get("plugins") or []
    changing = _changing(plugins if isinstance(plugins, list) else [plugins], "trainer.plugins")
    return {**node, "precision": node.get("precision") or "32-true", "plugins": changing or None}


def _changing(nodes: Iterable[Any], path: str) -> list[Any]:
    """The nodes whose classes may change numbers; those that are null are switched off."""
    return [n for n in nodes if n and not (isinstance(n, Mapping) and why_left_out(n.get("_target_"), path))]


def _by_class(nodes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Nodes by the names of their classes, since Lightning CLI has no others; a second of a class is ``NAME 2``."""
    seen: Counter[str] = Counter()
    found = {}
    for node in nodes:
        name = str(node["_target_"]).rpartition(".")[2]
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} {seen[name]}"] = node
    return found


def _listed(value: Any) -> Any:
    """Tuples as lists: one command line gives tuples, the other lists."""
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def from_cli(settings: Mapping[str, Any]) -> Run:
    """The run of a configuration of Lightning CLI. Settings that it lacks, of which none is recorded, are null."""
    run, data, trainer = (to_targets(settings[part]) for part in ("model", "data", "trainer"))
    run["model"] = reread(run["model"])  # a file may hold an older format
    callbacks = trainer.pop("callbacks", None) or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    parts = {"data": data["data"], "trainer": {"_target_": TRAINER, **trainer}, "callbacks": dict(enumerate(callbacks))}
    command = {"train": True, "ckpt_path": settings["ckpt_path"], "resume": settings["resume"]}
    return Run.assemble({**run, **parts, **command, "seed": settings["seed_everything"]})


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
    complete = isinstance(settings, dict)
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
