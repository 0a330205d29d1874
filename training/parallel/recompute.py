"""Activation checkpointing: activations are dropped in the forward pass and recomputed for the gradient.

``full``: a layer keeps only its input. ``selective``: feed-forward blocks keep only their input, since they have most
of a layer's activations and cost only their products; attention, whose cost grows quadratically with the length, keeps
what it computed. Tokens sent to experts are sent once more.

Not supported: torch's selection by operator, which keeps results that this project's kernels modify in place.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blockwright.blocks.layer import Layer
from blockwright.registry import ConfigError

Recompute = Literal["none", "selective", "full"]


def check(value: Any) -> None:
    """Refuse an unknown kind of activation checkpointing.

    Raises:
        ConfigError
    """
    if value not in get_args(Recompute):
        rule = f"must be one of {', '.join(get_args(Recompute))}"
        remedy = "selective recomputes feed-forward blocks, full everything"
        raise ConfigError("task.activation_checkpointing", value, rule, remedy)


def recompute(part: nn.Module, how: Recompute) -> None:
    """Make the layers in a part of a decoder, or a layer of an input, recompute activations in the backward pass."""
    layers: list[Any] = [m for m in part.modules() if isinstance(m, Layer)]
    for layer in layers or [part]:
        if how == "full":
            _forget(layer)
        elif how == "selective" and isinstance(
            getattr(layer, "ffn", None), nn.Module
        ):  # an input of a plug-in may have none
            _forget(layer.ffn)


def _forget(module: nn.Module) -> None:
    inner = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*arguments, **options)
        return checkpoint(inner, *arguments, use_reentrant=False, **options)

    module.forward = forward
