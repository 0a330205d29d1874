"""Modules of classes that run folders of before 2026-12-03 name, and where these classes are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINING = "blockwright.training."
MODULES = {
    **{f"schedulers.{name}": "schedulers" for name in ("constant", "warmup_cosine", "warmup_stable_decay")},
    "schedulers.warmup_step_decay": "schedulers",
    **{f"data.{name}": "data.corpora" for name in ("shakespeare", "standard_library", "kernel_documentation")},
    "data.sorting": "data.corpora",
    "data.text": "data.corpus",
    **{f"data.tokenizers.{name}": "data.tokenizers.tokenizer" for name in ("bytes", "chars")},
    **{f"optimizers.{name}": "optimizers.matrices" for name in ("head_muon", "muon", "normuon", "soap")},
    "optimizers.hyperball": "optimizers.recipe",
    **{f"callbacks.{name}": "callbacks.samples" for name in ("completions", "predictions")},
    "callbacks.early_stopping": "callbacks.interruption",
    **{f"callbacks.{name}": "callbacks.step_end" for name in ("averaging", "qk_clip")},
}


def with_moved(value: Any) -> Any:
    """Plain values with the current path of every class that has moved."""
    if isinstance(value, Mapping):
        return {k: _moved(v) if k in ("_target_", "class_path") else with_moved(v) for k, v in value.items()}
    return [with_moved(inner) for inner in value] if isinstance(value, list) else value


def _moved(dotted: Any) -> Any:
    if not isinstance(dotted, str) or not dotted.startswith(TRAINING):
        return dotted
    module, _, name = dotted.removeprefix(TRAINING).rpartition(".")
    return f"{TRAINING}{MODULES.get(module, module)}.{name}"
