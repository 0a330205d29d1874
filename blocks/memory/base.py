"""The contract of ``memory``: what a layer looks up by the ids of its tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import BlockError, family


@family("memory", context=("vocab_size", "n_streams"))
class Memory(Block):
    """An optional part of a layer, which reads ``given.tokens`` and is added to the residual stream.

    Its rows are in a ``Table`` (blocks/memory/table.py): then gradients are sparse, optimizers step only the rows that
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
