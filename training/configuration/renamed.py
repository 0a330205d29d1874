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
training.data.chat_module ChatDataModule
training.data.conversations Conversations
training.data.module TextDataModule
training.data.pages Pages
training.data.picture_conversations PictureConversations
training.data.picture_module PictureDataModule
training.data.pose PoSE
training.data.preference_module PreferenceDataModule
training.data.preferences Preferences
training.data.prompt_module PromptDataModule
training.data.reasoning_gym ReasoningGym
training.data.recall Recall
training.data.shakespeare Shakespeare
training.data.sorting Sorting SortingPreferences
training.data.text TextFiles
training.data.tokenizers.bpe BPE
training.data.tokenizers.bytes Bytes
training.data.tokenizers.chars Chars
training.data.tokenizers.pretrained Pretrained
training.lora Lora
training.optimizers.adamw AdamW
training.optimizers.muon Muon
training.parallel.strategy Parallel
training.schedulers.constant Constant
training.schedulers.warmup_cosine WarmupCosine
training.schedulers.warmup_stable_decay WarmupStableDecay
training.schedulers.warmup_step_decay WarmupStepDecay
training.surgery Surgery
training.tasks.causal_lm CausalLM
training.tasks.distill Distill
training.tasks.grpo Grpo
training.tasks.preference Preference
training.tasks.reward RewardModel
"""
MOVED = {
    f"{module}.{name}": f"blockwright.{module}.{name}"
    for module, *names in map(str.split, _ONCE_AT_THE_TOP.strip().splitlines())
    for name in names
}


def with_moved(value: Any) -> Any:
    """Plain values with the current path of every class that has moved."""
    if isinstance(value, Mapping):
        return {k: _moved(v) if k in ("_target_", "class_path") else with_moved(v) for k, v in value.items()}
    return [with_moved(inner) for inner in value] if isinstance(value, list) else value


def _moved(dotted: Any) -> Any:
    return MOVED.get(dotted, dotted) if isinstance(dotted, str) else dotted
