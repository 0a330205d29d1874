"""The contract of ``memory``: what a layer looks up by the ids of its tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import BlockError, family


@family("memory", context=("vocab_size", "n_streams"))
class Memory(Block):
    """An optional part of a layer, which reads ``given.tokens`` and is added to the residual stream.

    Its rows are in a ``Table`` (blocks/memory/base.py): then gradients are sparse, optimizers step only the rows that
    were read, sharding never gathers them, and a cost card counts of them what a token reads. Its constructor may take
    ``vocab_size``, and ``n_streams``, M, the residual streams of the model.

    Class attributes:
        place: whether it is added before the attention, or after the feed-forward block
        silent: qualified names of parameters with which, at 0, it adds nothing, and still learns: so it is put into a
            trained model

    Attributes:
        reach: how many tokens before a token its output depends on, beside what x holds of them. One with a reach has
            ``new_cache``. None: all of them; such a memory cannot be spread over ranks that share sequences
    """

    counted_as: ClassVar[str | None] = "memory"
    place: ClassVar[Literal["before", "after"]] = "before"
    silent: ClassVar[tuple[str, ...]] = ()
    reach: int | None = 0

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """What is added to the stream.

        Args:
            x: [B,T,D] of the residual stream, not normalised, or [B,T,M,D] of several
            given: its ``cache`` is that of ``new_cache``, ``embedded`` the input of the first layer, [B,T,D]

        Returns:
            the shape of x
        """
        raise NotImplementedError

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """An empty cache of what it needs of the tokens before; a memory without reach needs none."""
        raise NotImplementedError

    def ids(self, given: Pass) -> Tensor:
        """[B,T] ids of the tokens.

        Raises:
            BlockError: the caller gives none
        """
        if given.tokens is None:
            rule = "reads the ids of the tokens, which this caller does not pass"
            raise BlockError("memory", type(self).__name__, rule, "Call the layer with tokens, as the decoder does")
        return given.tokens


# --- a table of which a token reads a few rows ---


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
