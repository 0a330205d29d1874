"""A table of which a token reads a few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.registry import BlockError


def numbers(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, perhaps a sparse one: its own storage, if it is coalesced."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


class Table(nn.Embedding):
    """``torch.nn.Embedding`` with sparse gradients: ids [...] → rows [...,W].

    A gradient holds the rows that a batch read, once each, and optimizers step these alone
    (training/optimizers/row_adam.py). Sharding spreads the rows over ranks, which exchange what their tokens read
    (training/parallel/tables.py). A class of its own, since all of these find tables by it.

    Args:
        rows: V
        width: W, numbers of a row

    Raises:
        BlockError: no tensor can hold them
    """

    def __init__(self, rows: int, width: int) -> None:
        try:
            # With a weight there is no random draw, for which torch on the meta device imports its compiler.
            super().__init__(rows, width, sparse=True, _weight=torch.empty(rows, width, dtype=torch.float32))
        except (RuntimeError, TypeError):  # sizes beyond the address space
            rule = f"no tensor can hold so many rows of {width} numbers"
            raise BlockError("rows", rows, rule, "Choose fewer rows") from None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)
