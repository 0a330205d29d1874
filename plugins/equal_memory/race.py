"""Rounds in which every arm, at every precision, and the machine itself have a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.equal_memory.arm import Cell
from blockwright.plugins.equal_memory.clock import Seconds
from blockwright.plugins.equal_memory.full_batch import FullBatch
from blockwright.plugins.equal_memory.machine import Machine, Peaks
from blockwright.plugins.equal_memory.request import Settings


@dataclass(frozen=True)
class Turns:
    """What one cell did.

    Args:
        row_bytes: allocated for the caches of one sequence
        rows: sequences at once
        bytes: allocated for the caches of all of them
        seconds: of a step, in each round
    """

    row_bytes: int
    rows: int
    bytes: int
    seconds: tuple[Seconds, ...]

    def rates(self, device: torch.device) -> list[float]:
        """Tokens a second in each round, by the clock of the device."""
        return [self.rows / each.on(device) for each in self.seconds]


@dataclass(frozen=True)
class Race:
    """What the cells of one length did, and the rates of the machine in each of the same rounds."""

    turns: Mapping[Cell, Turns]
    peaks: tuple[Peaks, ...]


def race(decoders: Mapping[str, Decoder], cells: Sequence[Cell], settings: Settings, machine: Machine) -> Race:
    """Time cells in alternation, each round in the reverse order of the one before.

    The caches of one cell exist at a time; weights of all arms, and one sequence of every cell, stay.

    Args:
        decoders: arm → its decoder
        cells: of one length
        settings: of the measurement
        machine: that they run on
    """
    batches = {cell: FullBatch(decoders[cell.arm], cell, settings) for cell in cells}
    turns: dict[Cell, list[tuple[Seconds, int]]] = {cell: [] for cell in cells}
    peaks = []
    for number in range(settings.repeats):
        peaks.append(machine.turn())
        for cell in cells if number % 2 == 0 else reversed(cells):
            turns[cell].append(batches[cell].turn())
    done = {
        cell: Turns(each.row_bytes, each.rows, max(b for _, b in turns[cell]), tuple(s for s, _ in turns[cell]))
        for cell, each in batches.items()
    }
    return Race(done, tuple(peaks))
