"""Modules that compute the same: what is measured of one is measured of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def alike(layers: Sequence[nn.Module] | nn.ModuleList) -> list[list[int]]:
    """Groups of layers (indices) with equal cost: same classes, shapes and settings.

    A block that stores its ``layer_idx``, or differs in anything else, is alone in its group.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(signature(layer), []).append(index)
    return list(groups.values())


_INTERNAL = frozenset(vars(nn.Module()))


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """What a module computes with: classes, settings and shapes of all its parts."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    settings = [
        (name, type(m), sorted((k, repr(v)) for k, v in vars(m).items() if k not in _INTERNAL))
        for name, m in layer.named_modules()
    ]
    return repr(settings), tuple(shapes)
