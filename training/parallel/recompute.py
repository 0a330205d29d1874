"""Activation checkpointing: memory for time. What is forgotten in the forward pass is computed again for the gradient.

``full``: a layer keeps its input alone. ``selective``: feed-forward blocks keep their input alone, since they hold most
of a layer's activations at the price of its products only; attention, whose work grows with the square of the length,
keeps what it computed. Tokens that travel to experts travel once more.

Left out: torch's selection operator by operator. It keeps results that kernels of our own go on to write into.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocks.decoder import Layer
from registry import ConfigError

Recompute = Literal["none", "selective", "full"]


def check(value: Any) -> None:
    """Refuse what is no kind of activation checkpointing.

    Raises:
        ConfigError
    """
    if value not in get_args(Recompute):
        rule = f"is one of {', '.join(get_args(Recompute))}"
        remedy = "selective recomputes feed-forward blocks, full everything"
        raise ConfigError("task.activation_checkpointing", value, rule, remedy)


def recompute(part: nn.Module, how: Recompute) -> None:
    """Let the layers in a part of a decoder compute activations again in the backward pass."""
    for layer in [m for m in part.modules() if isinstance(m, Layer)]:
        if how == "full":
            _forget(layer)
        elif how == "selective":
            _forget(layer.ffn)


def _forget(module: nn.Module) -> None:
    inner = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*arguments, **options)
        return checkpoint(inner, *arguments, use_reentrant=False, **options)

    module.forward = forward
