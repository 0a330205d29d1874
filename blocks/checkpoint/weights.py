"""The weights of the model in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.checkpoint.read import PREFIX
from blockwright.blocks.linear import is_adapter, merged


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's weights by name, adapters merged.

    Args:
        checkpoint: from ``read_checkpoint``
    """
    found = raw_weights(checkpoint)
    adapter = checkpoint["hyper_parameters"].get("adapter")
    return merged(found, float(adapter["scale"])) if adapter else found


def shapes_of(checkpoint: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of ``weights_of``, without computing them."""
    return {name: tuple(tensor.shape) for name, tensor in raw_weights(checkpoint).items() if not is_adapter(name)}


def raw_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's weights and adapters by name, as stored."""
    return {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(PREFIX)}
