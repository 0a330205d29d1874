"""Windows of a stream as a torch data set: takes a list of first tokens, returns a batch of tensors.

A transform changes windows of training: their tokens, targets, positions or weights. It is named under
``data.transforms``; another package writes its own class as ``_target_``. Windows of evaluation are never transformed.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry.errors import ConfigError
from blockwright.training.data.order import BatchRows
from blockwright.training.data.packing import Ints, Stream, cut

Array = npt.NDArray[Any]


class Transform(ABC):
    """Changes each window of a training batch in place, with its own random draws."""

    def check(self, sequence_length: int, vocab_size: int) -> None:  # noqa: B027 # by default nothing can be wrong
        """Refuse settings that cannot work with these windows.

        Args:
            sequence_length: tokens of the longest window
            vocab_size: ids of the tokenizer

        Raises:
            blockwright.registry.errors.ConfigError: at a path below ``data.transforms``
        """

    def reach(self, sequence_length: int) -> int:
        """The number of positions that the transformed windows need."""
        return sequence_length

    @abstractmethod
    def __call__(self, window: dict[str, Array], random: np.random.RandomState) -> None:
        """Change one window.

        Args:
            window: ``tokens``, ``targets`` (−100: not scored), ``segments``, ``positions`` [T] int64; ``weights`` [T]
                float32, ones: the factor of each target in the training loss. Change the arrays in place
            random: a stream for this window alone, a function of seed, batch and row: the same after resuming and for
                every number of processes
        """


def stream_for(seed: int, name: str, batch: int, row: int) -> np.random.RandomState:
    """The random stream of a transform for one window.

    Args:
        seed: of the data
        name: of the transform
        batch: number of the global batch
        row: of the window in it
    """
    key = [seed, zlib.crc32(name.encode()), batch, row]
    # RandomState's streams never change between releases of numpy.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


# --- the long documents of a stream, as a ring of their own ---


class LongDocuments:
    """The tokens of the documents with at least ``least`` tokens, one after another. Nothing is copied: it is an index.

    Most text is short, so long windows cut from all of it hold many documents and few long distances. ProLong (Gao et
    al. 2024, arXiv 2410.02660) takes its long windows from books and repositories only.

    Args:
        stream: the tokens
        least: tokens of a document that is kept, its end included
    """

    def __init__(self, stream: Stream, least: int) -> None:
        lengths = np.diff(np.append(stream.starts, stream.n_tokens))
        kept = lengths >= least
        self.starts, self.lengths, self.least = stream.starts[kept], lengths[kept], least
        if not len(self.starts):
            longest = int(lengths.max(initial=0))
            rule = f"no document of the train split is so long: the longest has {longest} tokens"
            raise ConfigError("data.min_length", least, rule, f"Set data.min_length={longest} or less, or null")

    @cached_property
    def _ends(self) -> Ints:
        return np.cumsum(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens of these documents."""
        return int(self._ends[-1])

    def places(self, indices: Ints) -> Ints:
        """Indices into these documents → indices into the stream, of any shape."""
        document = np.searchsorted(self._ends, indices, side="right")
        return self.starts[document] + indices - (self._ends[document] - self.lengths[document])


@dataclass(frozen=True)
class Making:
    """How windows are made of the tokens.

    Args:
        joined: whether a window is one document
        long: documents from which the windows of ``sequence_length`` tokens are cut; None for all
        transforms: name → change of each window, in order
        seed: of their draws
    """

    joined: bool = False
    long: LongDocuments | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    seed: int = 0


class WindowBatches(Dataset[dict[str, Tensor]]):
    """Batches of windows. A subclass cuts them.

    Args:
        sequence_length: T, tokens of a window, unless a batch has its own length
        token_bytes: UTF-8 bytes of each id [V]
        making: how windows are made of the tokens
    """

    def __init__(self, sequence_length: int, token_bytes: Ints, making: Making | None = None) -> None:
        self.sequence_length, self.token_bytes, self.making = sequence_length, token_bytes, making or Making()

    @abstractmethod
    def _cut(self, offsets: list[int], length: int) -> dict[str, Array]:
        """The windows of so many tokens that begin at these ones, as in ``packing.cut``."""

    def __getitems__(self, offsets: list[int]) -> dict[str, Tensor]:
        """The batch of the windows that begin at these tokens.

        Args:
            offsets: first tokens [B], −1 for an empty window; ``BatchRows`` if windows are transformed

        Returns:
            tokens, targets [B, T] and n_bytes [B], all int64, as in ``packing.cut``; segments and positions [B, T],
            only if some window has more than one document or other positions: without them attention is plainly
            causal, and all rows share positions from 0; weights [B, T] fp32, only if some target has another than 1
        """
        length = offsets.length if isinstance(offsets, BatchRows) else self.sequence_length
        batch = self._cut(offsets, length)
        if self.making.transforms and isinstance(offsets, BatchRows):
            self._transform(batch, offsets)
        if not batch["segments"].any():
            del batch["segments"]
            if (batch["positions"] == np.arange(length)).all():
                del batch["positions"]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _transform(self, batch: dict[str, Array], rows: BatchRows) -> None:
        batch["weights"] = np.ones(batch["tokens"].shape, dtype=np.float32)
        for row in range(len(rows)):
            window = {name: array[row] for name, array in batch.items() if array.ndim == 2}
            for name, transform in self.making.transforms.items():
                transform(window, stream_for(self.making.seed, name, rows.batch, rows.first + row))
        if (batch["weights"] == 1).all():
            del batch["weights"]
        else:  # the sums that divide the loss are weighted, so its bytes are too
            scored, targets = batch["targets"] != IGNORED, batch["targets"].clip(min=0)
            batch["n_bytes"] = (np.where(scored, self.token_bytes[targets], 0) * batch["weights"]).sum(axis=1)

    # Called by a loader whose items are lists, without a batch sampler.
    __getitem__ = __getitems__


class Windows(WindowBatches):
    """Batches cut from a stream.

    Args:
        stream: the tokens
        sequence_length, token_bytes, making: as of ``WindowBatches``
        places: ``packing.ring`` for training, ``packing.line`` for evaluation
    """

    def __init__(
        self,
        stream: Stream,
        sequence_length: int,
        token_bytes: Ints,
        places: Callable[[Ints, int, int], Ints],
        making: Making | None = None,
    ) -> None:
        super().__init__(sequence_length, token_bytes, making)
        self.stream, self.places = stream, places

    def _cut(self, offsets: list[int], length: int) -> dict[str, Array]:
        firsts, long = np.array(offsets, dtype=np.int64), self.making.long
        if long is None or length < self.sequence_length:
            places = self.places(firsts, length + 1, self.stream.n_tokens)
        else:
            places = long.places(self.places(firsts, length + 1, long.n_tokens))
        return cut(self.stream, places, self.token_bytes, self.making.joined)


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collate function for batches that are already whole."""
    return batch
