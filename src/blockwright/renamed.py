"""Class paths of before 2026-11-28, which configuration files and checkpoints of that time contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Until 2026-11-28 these were packages of their own, beside the user's. Only classes that configurations named.
_ONCE_AT_THE_TOP = """
lab.asking.callback Asking
lab.reading.long_context LongContext
lab.run_report RunReport
lab.sweep.callback SweepCallback
lab.sweep.pruning Pruning
training.callbacks.completions Completions
training.callbacks.early_stopping EarlyStopping
training.callbacks.experts DeadExperts
training.callbacks.extrapolation Extrapolation
training.callbacks.guard Guard
training.callbacks.interruption Interruption
training.callbacks.machine Machine
training.callbacks.progress Progress
training.callbacks.qk_clip QKClip
training.callbacks.throughput Throughput
training.checkpoints.plugin SealedCheckpoints
training.checkpoints.saving Keeper
training.csv_logger CSVLogger
training.data.conversations Conversations
training.data.pages Pages
training.data.picture_conversations PictureConversations
training.data.pose PoSE
training.data.preferences Preferences
training.data.reasoning_gym ReasoningGym
training.data.recall Recall
training.data.shakespeare Shakespeare
training.data.sorting Sorting SortingPreferences
training.data.text TextFiles
training.data.tokenizers.bpe BPE
training.data.tokenizers.bytes Bytes
training.data.tokenizers.chars Chars
training.data.tokenizers.pretrained Pretrained
training.optimizers.adamw AdamW
training.optimizers.muon Muon
training.parallel.strategy Parallel
training.schedulers.constant Constant
training.schedulers.warmup_cosine WarmupCosine
training.schedulers.warmup_stable_decay WarmupStableDecay
training.schedulers.warmup_step_decay WarmupStepDecay
"""
# Of these, some are in other modules since.
_SINCE = {
    "lab.asking.callback.Asking": "plugins.vision.asking.callback.Asking",
    "lab.reading.long_context.LongContext": "plugins.long_context.reading.callback.LongContext",
    "training.callbacks.extrapolation.Extrapolation": "plugins.long_context.extrapolation.Extrapolation",
    "training.data.pages.Pages": "plugins.vision.data.pages.Pages",
    "training.data.picture_conversations.PictureConversations": (
        "plugins.vision.data.picture_conversations.PictureConversations"
    ),
    "training.data.pose.PoSE": "plugins.long_context.pose.PoSE",
    "training.data.preferences.Preferences": "plugins.alignment.data.preferences.Preferences",
    "training.data.reasoning_gym.ReasoningGym": "plugins.alignment.data.reasoning_gym.ReasoningGym",
    "training.data.recall.Recall": "plugins.long_context.recall.Recall",
    "training.data.sorting.SortingPreferences": "plugins.alignment.data.sorting.SortingPreferences",
}
MOVED = {
    path: f"blockwright.{_SINCE.get(path, path)}"
    for module, *names in map(str.split, _ONCE_AT_THE_TOP.strip().splitlines())
    for path in (f"{module}.{name}" for name in names)
}
# Until 2026-12-01 each schedule was a module of its own.
for _old in [path for path in MOVED if path.startswith("training.schedulers.")]:
    _new = f"blockwright.training.schedulers.{_old.rpartition('.')[2]}"
    MOVED |= {_old: _new, f"blockwright.{_old}": _new}


# Until 2026-11-28 a task and a data module were named by their classes, and took what the run knows as settings.
_ONCE_BY_CLASS = """
task causal_lm training.tasks.causal_lm.CausalLM
task distill training.tasks.distill.Distill
task grpo training.tasks.grpo.Grpo
task preference training.tasks.preference.Preference
task reward training.tasks.reward.RewardModel
data text training.data.module.TextDataModule
data chat training.data.chat_module.ChatDataModule
data prompts training.data.prompt_module.PromptDataModule
data preferences training.data.preference_module.PreferenceDataModule
data images training.data.picture_module.PictureDataModule
"""
NAMED = {
    f"{prefix}{path}": (kind, name)
    for kind, name, path in map(str.split, _ONCE_BY_CLASS.strip().splitlines())
    for prefix in ("", "blockwright.")
}
_OF_THE_RUN = ("model", "optimizer", "scheduler", "seed", "init_from", "adapter", "surgery")  # once settings of a task
# Until 2026-11-29 two starts were named by their classes, and a third was a setting of the task.
STARTS = ("training.lora.Lora", "training.surgery.Surgery")
TOWER = "tower"
_OF_WINDOWS = ("documents", "min_length", "lengths", "transforms")  # once settings of all data, and refused by most
_FORMER = {"task": _OF_THE_RUN, "data": ("model", *_OF_WINDOWS)}


def with_moved(value: Any) -> Any:
    """Plain values with the current path of every class that has moved, and the names of tasks and data modules."""
    if isinstance(value, Mapping):
        node = {k: _moved(v) if k in ("_target_", "class_path") else with_moved(v) for k, v in value.items()}
        return _with_tower(_start(_named(node)))
    return [with_moved(inner) for inner in value] if isinstance(value, list) else value


def _named(node: dict[str, Any]) -> dict[str, Any]:
    """A task or data module by its name; of Lightning CLI, within the part of its configuration."""
    path = node.get("class_path", node.get("_target_"))
    if not isinstance(path, str) or path not in NAMED:
        return node
    kind, name = NAMED[path]
    settings = (node.get("init_args") or {}) if "class_path" in node else node
    former = () if name == "text" else _FORMER[kind]
    own = {k: v for k, v in settings.items() if k not in ("_target_", "name", *former)}
    if "class_path" not in node:
        return {"name": name, **own}
    return {kind: {"name": name, **own}, **{k: settings[k] for k in _OF_THE_RUN if k in settings and kind == "task"}}


def _start(node: dict[str, Any]) -> dict[str, Any]:
    """The settings of a start, whose name is its key, without its class."""
    path = node.get("class_path", node.get("_target_"))
    if not isinstance(path, str) or path.removeprefix("blockwright.") not in STARTS:
        return node
    settings = node.get("init_args") or {} if "class_path" in node else node
    return {key: value for key, value in settings.items() if key != "_target_"}


def _with_tower(node: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose tower is a start, and no setting of its task."""
    task = node.get("task")
    if not isinstance(task, Mapping) or TOWER not in task:
        return node
    folder = task[TOWER]
    start = {} if folder is None else {TOWER: {"folder": folder}}
    return {**node, "task": {key: value for key, value in task.items() if key != TOWER}, **start}


def _moved(dotted: Any) -> Any:
    return MOVED.get(dotted, dotted) if isinstance(dotted, str) else dotted
