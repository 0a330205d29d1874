"""Activation checkpointing: memory for time. Layers forget what they computed, and compute it again for the gradient.

``full`` keeps a layer's input alone; ``selective`` keeps besides what is dear to compute again: products of matrices,
attention, and what came from other ranks.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from registry import ConfigError

Recompute = Literal["none", "selective", "full"]
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "grouped_matmul")
PREFIXES = ("_scaled_dot_product", "all_to_all", "all_reduce")  # kernels of attention; what other ranks sent

# FSDP2 marks what it does inside a layer for profilers, and not as often when the layer is computed again.
_profiler = torch.ops.profiler
SAC_IGNORED_OPS.update({_profiler._record_function_enter_new.default, _profiler._record_function_exit._RecordFunction})


def check(value: Any) -> None:
    """Refuse what is no kind of activation checkpointing.

    Raises:
        ConfigError
    """
    if value not in get_args(Recompute):
        rule = f"is one of {', '.join(get_args(Recompute))}"
        remedy = "selective recomputes what is cheap, full everything"
        raise ConfigError("task.activation_checkpointing", value, rule, remedy)


def recompute(layer: nn.Module, how: Recompute) -> None:
    """Let a layer recompute its activations in the backward pass."""
    if how == "none":
        return
    contexts: dict[str, Any] = {}
    if how == "selective":
        contexts["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    inner = layer.forward

    def forward(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*arguments)
        return checkpoint(inner, *arguments, use_reentrant=False, **contexts)

    layer.forward = forward


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator.name().rpartition("::")[2].partition(".")[0] if hasattr(operator, "name") else ""
    kept = name in PRODUCTS or name.startswith(PREFIXES)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
