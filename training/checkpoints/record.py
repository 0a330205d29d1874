"""The record of a run in its checkpoints: every setting that can change a weight or a figure, as it was given.

What is recorded is what is not left out, so a new setting is recorded by itself. Nothing that is found or settled later
(the checkpoint to resume from, folders) is recorded: the same command has the same record at every start.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from blockwright import registry
from blockwright.blocks.checkpoint.sharded import is_folder, read_meta
from blockwright.blocks.compose import reread
from blockwright.renamed import with_moved
from blockwright.training.configuration.instantiate import find_target, to_targets
from blockwright.training.configuration.run import STANDARD, Run

# --- callbacks and plugins that only observe: adding, changing or removing one changes no weight and no figure ---


def why_left_out(target: Any, path: str) -> str | None:
    """Why a class is no part of the record of a run; None if it is a part.

    Args:
        target: its dotted path
        path: of the setting

    Raises:
        ConfigError: it cannot be imported
    """
    cls = find_target(target, path)
    if not isinstance(cls, type):
        return None
    return getattr(cls, "observes", None) or next((why for base, why in _of_lightning() if issubclass(cls, base)), None)


def _of_lightning() -> list[tuple[type, str]]:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch import callbacks

    return [
        (CheckpointIO, "writes files"),
        (callbacks.Checkpoint, "chooses which weights are kept"),
        (callbacks.ProgressBar, "shows what was logged"),
        (callbacks.ModelSummary, "shows the model"),
        (callbacks.LearningRateMonitor, "logs rates that are set elsewhere"),
        (callbacks.DeviceStatsMonitor, "logs what the device is doing"),
        (callbacks.ThroughputMonitor, "measures speed"),
        (callbacks.BasePredictionWriter, "writes predictions"),
    ]


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
    node = given.get("trainer") or {}
    plugins = node.get("plugins") or []
    changing = _changing(plugins if isinstance(plugins, list) else [plugins], "trainer.plugins")
    given["trainer"] = {**node, "precision": node.get("precision") or "32-true", "plugins": changing or None}
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
    kept = {key: inner for key, inner in node.items() if not is_left_out(f"{path}{key}")}
    return {key: _kept(inner, f"{path}{key}.") for key, inner in kept.items()}


def is_left_out(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in LEFT_OUT)


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


# --- differences between the settings of a run and those of a checkpoint, and which of them matter ---


_LENGTH = "a longer run is still the same run"
SAME_RUN = {  # setting → why the run is still the same if it changes; such a change is shown
    "trainer.max_steps": _LENGTH,
    "trainer.max_epochs": _LENGTH,
    "trainer.max_time": _LENGTH,
    "trainer.min_steps": _LENGTH,
    "trainer.min_epochs": _LENGTH,
    "trainer.log_every_n_steps": "the same steps are logged, at other intervals",
}
# Keys of a model that affect training but not its output; all others determine the meaning of its weights.
TRAINING_ONLY = ("model.init", "model.max_positions", "model.mtp.loss_weight")
TRAINING_ONLY_PARTS = {"balance", "dropping", "bias_step", "bias_until"}
WIDEST = 48  # characters of a value in a table
_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """A setting that differs.

    Args:
        path: of the setting
        there: its value in the checkpoint, or whatever this run is compared with
        here: its value in this run
    """

    path: str
    there: Any
    here: Any

    @property
    def alters_weights(self) -> bool:
        """Whether the same weights compute something else with this change."""
        parts = self.path.split(".")
        training_only = self.path.startswith(TRAINING_ONLY) or TRAINING_ONLY_PARTS & set(parts)
        return parts[0] == "model" and not training_only

    def __str__(self) -> str:
        return f"{self.path} was {_shown(self.there)}, is {_shown(self.here)}"


def changes(past: Past, ours: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs; for a checkpoint without a record, only among those that it holds.

    Args:
        past: of the checkpoint
        ours: the record of this run
    """
    parts = {**past.settings, **ours} if past.complete else past.settings
    found = [c for part in parts for c in _differences(part, past.settings.get(part), ours.get(part))]
    # A checkpoint without a record may come from an older version, which wrote out unset values.
    return [c for c in found if past.complete or None not in (c.there, c.here) or _ABSENT not in (c.there, c.here)]


def is_same_run(past: Past, ours: Mapping[str, Any]) -> bool:
    """Whether this run may be the one that wrote a checkpoint: only its length may differ, and how often it logs."""
    return not [change for change in changes(past, ours) if change.path not in SAME_RUN]


def weight_changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Change]:
    """The differences between two compositions that change what the same weights compute.

    Args:
        there: composition that the weights were trained in
        here: composition that they are put into
    """
    return [change for change in _differences("model", there, here) if change.alters_weights]


def _differences(path: str, there: Any, here: Any) -> Iterator[Change]:
    if there == here or (_is_empty(there) and _is_empty(here)):
        return
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        yield Change(path, there, here)
        return
    for key in ("name", "_target_"):  # another block or class has other parameters
        if there.get(key) != here.get(key):
            yield Change(path, there.get(key), here.get(key))
            return
    for key in {**there, **here}:
        old, new = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if (old is _ABSENT) != (new is _ABSENT) and _default(path, here, key) == (new if old is _ABSENT else old):
            continue  # one command line writes out defaults, the other may not
        yield from _differences(f"{path}.{key}", old, new)


def _default(path: str, node: Mapping[str, Any], key: str) -> Any:
    """The default value of an argument of the class of a node: by ``_target_``, or as the task, the data or a start.

    Args:
        path: of the node
        node: from this run's configuration, never a checkpoint's: its class is imported
        key: the argument
    """
    found: Any = None
    if "_target_" in node:
        found = inspect.signature(find_target(node["_target_"], "")).parameters.get(key)
    elif path in registry.names("start"):
        found = registry.lookup("start", path).schema.parameters.get(key)
    elif path in registry.kinds(registry.ROOT) and node.get("name") in registry.names(path):
        found = registry.lookup(path, node["name"]).schema.parameters.get(key)
    default = _ABSENT if found is None else found.default
    return list(default) if isinstance(default, tuple) else default


def _is_empty(value: Any) -> bool:
    """``layout: null`` equals ``layout: {}``; an absent child does not equal null."""
    return value is None or value in ({}, [])


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    if isinstance(value, Mapping) and set(value) == {"name"}:
        value = value["name"]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def table(found: Sequence[Change], there: str = "in the checkpoint") -> str:
    """A table with a row per change: setting, value there, value here."""
    rows = [("setting", there, "here")]
    rows += [(change.path, _shown(change.there), _shown(change.here)) for change in found]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def listed(found: Sequence[Change], most: int = 3) -> str:
    """The first changes as text."""
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(map(str, found[:most])) + more
