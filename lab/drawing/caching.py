"""What a block caches: read off the caches that an attention or a memory makes on the meta device, or a convolution."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.convolution import Convolution
from blockwright.blocks.cost import FAR
from blockwright.blocks.memory.base import Memory
from blockwright.lab.drawing.parts import Cached


def cached(block: nn.Module) -> tuple[Cached, ...]:
    """What is cached for a block itself: nothing for most.

    Raises:
        NotImplementedError: an attention makes no cache, or a memory has no reach
    """
    if isinstance(block, Convolution):
        return (Cached("inputs", block.tail, (), "state", 0, 0, prod(block.tail), False),)
    return _of_cache(block) if isinstance(block, Attention | Memory) else ()


def _of_cache(attention: Attention | Memory) -> tuple[Cached, ...]:
    widths = attention.remembered().widths() if isinstance(attention, Scored) else {}
    near, far = _buffers(attention, FAR), _buffers(attention, 2 * FAR)
    one, two = _buffers(attention, 1), _buffers(attention, 2)
    return tuple(
        _cached(name, tuple(widths.get(name, ())), *(made[name] for made in (one, two, near, far)))
        for name in far
        if far[name].numel()
    )


def _buffers(attention: Attention | Memory, length: int) -> dict[str, Tensor]:
    return attention.new_cache(1, length, torch.bfloat16, torch.device("meta")).buffers


def _cached(name: str, parts: tuple[int, ...], one: Tensor, two: Tensor, near: Tensor, far: Tensor) -> Cached:
    """One tensor, from what it is for 1, 2, FAR and 2 FAR tokens."""
    growth, wide = (far.numel() - near.numel()) / FAR, far.dtype == torch.float32
    constant = 2 * near.numel() - far.numel()
    if growth:
        shape = tuple(far.shape[2:])
        every = round(prod(shape) / growth)
        return Cached(name, shape, parts, "all" if every == 1 else "every", every, growth, constant, wide)
    if two.numel() > one.numel():
        return Cached(name, tuple(far.shape[2:]), parts, "last", far.shape[1], 0, constant, wide)
    return Cached(name, tuple(far.shape[1:]), parts, "state", 0, 0, constant, wide)
