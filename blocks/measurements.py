"""Measurements of parts that are remembered, for a program that changes one part of a model at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from blockwright.blocks.alike import signature

_memory: ContextVar[dict[Any, int] | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(memory: dict[Any, int]) -> Iterator[None]:
    """Measure equal parts once for all models that are measured within, for a program that changes one part at a time.

    Args:
        memory: what a part computes with, and its input → its cost
    """
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def known() -> dict[Any, int]:
    """Measurements so far, to add to; of this call alone, where ``remembering`` is not in effect."""
    memory = _memory.get()
    return {} if memory is None else memory


def measurement(what: str, part: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """A measurement of a part: all that it depends on."""
    return what, signature(part), tuple(x.shape), x.dtype
