"""Skipping positions: long distances at the cost of short windows."""

from __future__ import annotations

import numpy as np

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import BelowOne, Count
from blockwright.training.data.transform import Array, Transform

PATH = "data.transforms.pose"


@enforced(PATH)
class PoSE(Transform):
    """Positional skip-wise training: a window of T tokens is cut into chunks, whose positions skip ahead.

    Zhu et al. 2023, arXiv 2309.10400: chunk i keeps its tokens and gets positions t + u_i, 0 = u_0 ≤ u_1 ≤ …, each u
    uniform between the one before and ``target`` − T. Cuts and skips are drawn for each window, so all distances up to
    ``target`` occur while attention costs T² only.

    Documents that are kept apart within a window keep their own zero: the skip of a later chunk is added to positions
    that count from the start of their document. The released code also skips at the start of the first chunk, which
    changes nothing under rotary positions.

    Args:
        target: positions of the extended model, in tokens
        chunks: pieces of a window; 2 in the paper
        margin: least length of a chunk, as a fraction of the window divided by ``chunks``
    """

    def __init__(self, target: Count, chunks: Count = 2, margin: BelowOne = 0.25) -> None:
        self.target, self.chunks, self.margin = target, chunks, margin
        if chunks < 2:
            raise ConfigError(f"{PATH}.chunks", chunks, "positions skip between chunks", "Write 2 or more")

    def check(self, sequence_length: int, vocab_size: int) -> None:
        """Refuse a target shorter than a window, and windows that cannot be cut."""
        if self.target < sequence_length:
            rule = f"is shorter than a window (data.sequence_length = {sequence_length})"
            raise ConfigError(f"{PATH}.target", self.target, rule, "Name the length to extend to, or shorten windows")
        if self.chunks > sequence_length:
            rule = f"is more than a window has tokens (data.sequence_length = {sequence_length})"
            raise ConfigError(f"{PATH}.chunks", self.chunks, rule, "Write 2, as the paper")

    def reach(self, sequence_length: int) -> int:
        """``target``."""
        return max(self.target, sequence_length)

    def __call__(self, window: dict[str, Array], random: np.random.RandomState) -> None:
        """Shift the positions of every chunk but the first."""
        positions = window["positions"]
        length = len(positions)
        least = int(self.margin * length / self.chunks)
        free = length - least * self.chunks
        cuts = np.sort(random.randint(0, free + 1, size=self.chunks - 1)) + least * np.arange(1, self.chunks)
        skips = np.sort(random.randint(0, self.target - length + 1, size=self.chunks - 1))
        for cut, more in zip(cuts, np.diff(skips, prepend=0), strict=True):
            positions[cut:] += more
