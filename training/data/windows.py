"""Windows of a stream as a torch data set: a list of first tokens goes in, a batch of tensors comes out."""

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
            tokens, targets [B, T] and n_bytes [B], all int64, as ``packing.cut`` describes them; and segments and
            positions [B, T], only if some window holds more than one document: without them attention is plainly
            causal, and all rows count from 0, by one row of positions
        """
        places = self.places(np.array(offsets, dtype=np.int64), self.sequence_length + 1, self.stream.n_tokens)
        batch = cut(self.stream, places, self.token_bytes)
        if not batch["segments"].any():
            del batch["segments"], batch["positions"]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    # A loader that is given lists as its items, and no batch sampler, asks this way.
    __getitem__ = __getitems__


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collate function of batches that come whole."""
    return batch
