"""Refuse caches that a machine cannot hold, before they are allocated: a system may end a process that fills them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.kernels.machine import device_memory
from blockwright.registry import BlockError

MOST = 2**36  # tokens of all rows: no machine holds more, and sizes of many more do not fit 64 bits


def caches_that_fit(
    make: Callable[[torch.device], Sequence[Cache]], rows: int, length: int, device: torch.device
) -> list[Cache]:
    """Caches, after they have been counted on the meta device.

    Args:
        make: makes them on a device
        rows: of each
        length: tokens of a row
        device: that they are for

    Raises:
        BlockError: they take more memory than the device has
    """
    needed = sum(getattr(cache, "nbytes", 0) for cache in make(torch.device("meta"))) if rows * length <= MOST else None
    if needed is None or needed > device_memory(device):
        size = "" if needed is None else f" take {needed / 1e9:,.4g} GB, and they"
        rule = f"caches of {rows:,} × {length:,} tokens{size} are more than the memory of {device.type}"
        raise BlockError("caches", rows * length, rule, "Choose fewer rows, fewer tokens, or fewer bits")
    return list(make(device))
