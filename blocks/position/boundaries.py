"""Sequences of one batch that a model rotates alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from blockwright.blocks.position.base import Position


def boundaries(model: nn.Module) -> list[int]:
    """The lengths at which positions of a model change how a sequence is rotated, ascending."""
    found = (module.boundary for module in model.modules() if isinstance(module, Position))
    return sorted({boundary for boundary in found if boundary is not None})


def alike(model: nn.Module, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of rows, the longest first, each with rows on one side of every boundary.

    Padding makes the rows of a batch as long as its longest, which is the length that is declared: a short row beside a
    long one would be rotated otherwise than by itself.

    Args:
        lengths: of each row, in tokens
        size: most rows of a batch
    """
    ends = boundaries(model)
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        beside = batch and any(lengths[row] <= end < lengths[batch[0]] for end in ends)
        if len(batch) == size or beside:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
