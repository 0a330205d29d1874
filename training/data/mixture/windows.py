"""Windows of a mixture as a torch data set."""

from __future__ import annotations

import numpy as np

from blockwright.training.data.mixture.tokens import Cutting
from blockwright.training.data.packing import Ints, shaped
from blockwright.training.data.transform import Array
from blockwright.training.data.windows import Making, WindowBatches


class MixtureWindows(WindowBatches):
    """Batches of windows cut from several sources, or from one.

    Args:
        cutting: cuts them
        sequence_length: T, tokens of a window
        token_bytes: UTF-8 bytes of each id [V]
        eos: the id of padding
        making: how windows are made of the tokens
    """

    def __init__(self, cutting: Cutting, sequence_length: int, token_bytes: Ints, eos: int, making: Making) -> None:
        super().__init__(sequence_length, token_bytes, making)
        self.cutting, self.eos = cutting, eos

    def _cut(self, offsets: list[int], length: int) -> dict[str, Array]:
        cut = self.cutting.cut(offsets, length + 1)
        begins = np.zeros_like(cut.begins) if self.making.joined else cut.begins & cut.real
        return shaped(np.where(cut.real, cut.ids, self.eos), begins, cut.real, self.token_bytes)
