"""Windows of a stream as a torch data set: takes a list of first tokens, returns a batch of tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.data.packing import Ints, Stream, cut


class Windows(Dataset[dict[str, Tensor]]):
    """Batches cut from a stream.

    Args:
        stream: the tokens
        sequence_length: T, tokens of a window
        token_bytes: UTF-8 bytes of each id [V]
        places: ``packing.ring`` for training, ``packing.line`` for evaluation
    """

    def __init__(
        self, stream: Stream, sequence_length: int, token_bytes: Ints, places: Callable[[Ints, int, int], Ints]
    ) -> None:
        self.stream, self.sequence_length, self.token_bytes, self.places = stream, sequence_length, token_bytes, places

    def __getitems__(self, offsets: list[int]) -> dict[str, Tensor]:
        """The batch of the windows that begin at these tokens.

        Args:
            offsets: first tokens [B], −1 for an empty window

        Returns:
            tokens, targets [B, T] and n_bytes [B], all int64, as in ``packing.cut``; and segments and positions [B, T],
            only if some window has more than one document: without them attention is plainly causal, and all rows
            share positions from 0
        """
        places = self.places(np.array(offsets, dtype=np.int64), self.sequence_length + 1, self.stream.n_tokens)
        batch = cut(self.stream, places, self.token_bytes)
        if not batch["segments"].any():
            del batch["segments"], batch["positions"]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    # Called by a loader whose items are lists, without a batch sampler.
    __getitem__ = __getitems__


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collate function for batches that are already whole."""
    return batch
