"""Rounds: every cell has a turn in each, in an order that reverses, and the machine is measured in the same rounds."""

from __future__ import annotations

from typing import Any

import pytest

from blockwright.plugins.equal_memory import race as races
from blockwright.plugins.equal_memory.arm import Cell
from blockwright.plugins.equal_memory.clock import Seconds
from blockwright.plugins.equal_memory.machine import Peaks
from blockwright.plugins.equal_memory.race import race
from blockwright.plugins.equal_memory.request import Settings

CELLS = [Cell(arm, bits, 64) for bits in (None, 6) for arm in ("mha", "mla")]


class Recorded:
    """Stands for a full batch or a machine: notes its turns, and takes longer each time."""

    def __init__(self, name: Any, log: list[Any]) -> None:
        self.name, self.log, self.rows, self.row_bytes = name, log, 3, 10

    def turn(self) -> Any:
        self.log.append(self.name)
        if self.name == "machine":
            return Peaks(1.0, float(len(self.log)))
        return Seconds(float(len(self.log)), 0.0), 30


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setattr(races, "FullBatch", lambda decoder, cell, settings: Recorded(cell, log))
    decoders: Any = {"mha": None, "mla": None}
    machine: Any = Recorded("machine", log)
    done = race(decoders, CELLS, Settings("1kB", repeats=3), machine)
    there, back = ["machine", *CELLS], ["machine", *reversed(CELLS)]
    assert log == [*there, *back, *there]
    assert [each.read for each in done.peaks] == [1.0, 6.0, 11.0]
    assert [s.processor for s in done.turns[CELLS[0]].seconds] == [2.0, 10.0, 12.0]
    assert list(done.turns) == CELLS and done.turns[CELLS[3]].bytes == 30
