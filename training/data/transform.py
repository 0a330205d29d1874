"""The interface of a change to training windows: of their tokens, targets, positions or weights.

A transform is named under ``data.transforms``; another package writes its own class as ``_target_``. Windows of
evaluation are never transformed.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

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
