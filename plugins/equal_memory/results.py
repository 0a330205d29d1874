"""What was measured, of each cell beside what the planner predicts, and three comparisons apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.equal_memory.arm import Arm, Cell, cells_of
from blockwright.plugins.equal_memory.race import Peaks, Race, Turns
from blockwright.plugins.equal_memory.request import Bits, Request
from blockwright.plugins.planner.generation import Generation, bytes_of_one, generation
from blockwright.plugins.planner.hardware import Coefficients, Hardware, coefficients, hardware

REACHED = Coefficients(**{field.name: 1.0 for field in fields(Coefficients)})  # rates are measured, not peaks
GPU, GPUS, CONTEXT = "h800", 8, 4096  # of the paper's node, and tokens in each cache


@dataclass(frozen=True)
class Claim:
    """How a model does against another.

    Args:
        name: of the comparison
        rows: sequences at once against the other's, at equal memory; None if unknown
        speed: tokens a second against the other's
        saved: share of the bytes of the other's cache that it does without; None if unknown
    """

    name: str
    rows: float | None
    speed: float
    saved: float | None


PAPER = Claim("DeepSeek-V2 against DeepSeek 67B, arXiv 2405.04434", None, 5.76, 0.933)


def fitting(decoder: Decoder, budget: int, context: int, bits: Bits, most: int | None) -> int:
    """Sequences that the planner expects to fit.

    Args:
        decoder: on the meta device
        budget: bytes of all caches
        context: tokens in each
        bits: of their numbers; None for those of the weights
        most: sequences at most; needed where a sequence takes nothing
    """
    width = _width(decoder)
    one = bytes_of_one(decoder, context, width, bits or width)
    limits = [budget / one] if one else []
    return int(min(limits if most is None else [*limits, most]))


def planned(decoder: Decoder, peaks: Peaks, rows: int, context: int, bits: Bits) -> Generation:
    """The planner's step of a batch, on a machine of these rates; arguments as of ``fitting``."""
    width = _width(decoder)
    own = Hardware(
        "this machine", peaks.flops, peaks.flops, math.inf, peaks.read, math.inf, math.inf, 1, 0.0, card="none"
    )
    at: dict[str, Any] = {"weight_bits": width, "cache_bits": bits or width, "context": context}
    return generation(decoder, own, REACHED, gpus=1, batch=rows, **at)


def _width(decoder: Decoder) -> int:
    """Bits of a weight."""
    return 8 * decoder.output_weight.dtype.itemsize


def paper() -> list[Claim]:
    """The paper's claim, and the planner's of that node: both changes, the architecture alone, the bits alone."""
    models = {name: compose(preset(name), device="meta") for name in ("deepseek_v2", "deepseek_67b")}

    def plan(name: str, weight_bits: int, cache_bits: int) -> Generation:
        at: dict[str, Any] = {"weight_bits": weight_bits, "cache_bits": cache_bits, "context": CONTEXT}
        return generation(models[name], hardware(GPU), coefficients(), gpus=GPUS, **at)

    quantised, exact, dense = plan("deepseek_v2", 8, 6), plan("deepseek_v2", 16, 16), plan("deepseek_67b", 16, 16)
    node = f"planned for {GPUS} {GPU.upper()}, {CONTEXT:,} tokens"
    return [
        PAPER,
        _claim(f"{node}: V2 with 8-bit weights and 6-bit caches against 67B", quantised, dense),
        _claim(f"{node}: V2 against 67B, both in 16 bits", exact, dense),
        _claim(f"{node}: V2 with 8-bit weights and 6-bit caches against 16 bits", quantised, exact),
    ]


def _claim(name: str, one: Generation, other: Generation) -> Claim:
    bytes_of = [each.caches / each.batch for each in (one, other)]
    speed = one.tokens_per_second / other.tokens_per_second
    return Claim(name, one.batch / other.batch, speed, 1 - bytes_of[0] / bytes_of[1])


Change = Literal["architecture", "bits", "both"]
HEADINGS: dict[Change, str] = {
    "architecture": "Architecture at equal bits",
    "bits": "Bits alone",
    "both": "Architecture and bits",
}


@dataclass(frozen=True)
class Spread:
    """A median over the rounds, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """A cell as it was measured, and as it was planned.

    Args:
        cell: arm, bits, context
        weights: bytes
        turns: in all rounds
        speed: tokens a second
        planned_rows: sequences that the planner expects to fit
        planned: tokens a second that it expects of them
        roofline: tokens a second of the rows that fit, if all reading and all computing overlap at the machine's rates
    """

    cell: Cell
    weights: int
    turns: Turns
    speed: Spread
    planned_rows: int
    planned: float
    roofline: float

    @property
    def rows_off(self) -> float:
        """Relative error of the planner's number of sequences."""
        return self.planned_rows / self.turns.rows - 1

    @property
    def off(self) -> float:
        """Relative error of the planner's tokens a second."""
        return self.planned / self.speed.median - 1

    def as_plain(self) -> dict[str, Any]:
        """For ``--json``; seconds of a step for each round."""
        turns = self.turns
        return {
            **asdict(self.cell),
            "weights_bytes": self.weights,
            "sequence_bytes": turns.row_bytes,
            "rows": turns.rows,
            "caches_bytes": turns.bytes,
            "processor_seconds": [each.processor for each in turns.seconds],
            "wall_seconds": [each.wall for each in turns.seconds],
            "tokens_per_second": asdict(self.speed),
            "roofline_tokens_per_second": self.roofline,
            "planned": {"rows": self.planned_rows, "tokens_per_second": self.planned},
            "planner_off": {"rows": self.rows_off, "tokens_per_second": self.off},
        }


@dataclass(frozen=True)
class Comparison:
    """One cell against another of the same length.

    Args:
        change: in what they differ
        cell, against: the two
        rows: sequences at once, relative to the other's
        speed: tokens a second, relative to the other's in the same round
        planned: the same by the planner
        saved: share of the bytes of a sequence's caches that the other takes and this one does not
    """

    change: Change
    cell: Cell
    against: Cell
    rows: float
    speed: Spread
    planned: float
    saved: float

    @property
    def verdict(self) -> str:
        """Whether all rounds agree that it is faster or slower."""
        return "better" if self.speed.least > 1 else "worse" if self.speed.most < 1 else "undecided"


@dataclass(frozen=True)
class Results:
    """Everything that a command measured.

    Args:
        request: the command
        device: that computed
        rows: in the order of contexts, bits and arms
        peaks: context → rates of the machine, the median of the same rounds
        claims: of the paper, and of the planner about it
    """

    request: Request
    device: torch.device
    rows: tuple[Row, ...]
    peaks: Mapping[int, Peaks]
    claims: tuple[Claim, ...]

    @property
    def by_cell(self) -> dict[Cell, Row]:
        return {row.cell: row for row in self.rows}

    def comparisons(self, change: Change) -> list[Comparison]:
        """Of each cell in which this and nothing else changes, in the order of the rows."""
        return [
            self._compared(change, row.cell, against) for row in self.rows for against in self._against(change, row)
        ]

    def _against(self, change: Change, row: Row) -> list[Cell]:
        """The cell that another is compared with; none if it does not differ in this way."""
        cell, first = row.cell, self.request.settings.bits[0]
        differs = {"architecture": cell.arm != self.request.baseline, "bits": cell.bits != first}
        if change == "both":
            return [Cell(self.request.baseline, first, cell.context)] * all(differs.values())
        other = Cell(self.request.baseline, cell.bits, cell.context)
        return [other if change == "architecture" else Cell(cell.arm, first, cell.context)] * differs[change]

    def _compared(self, change: Change, cell: Cell, against: Cell) -> Comparison:
        one, other = self.by_cell[cell], self.by_cell[against]
        rates = [row.turns.rates(self.device) for row in (one, other)]
        saved = 1 - one.turns.row_bytes / other.turns.row_bytes if other.turns.row_bytes else 0.0
        return Comparison(
            change,
            cell,
            against,
            one.turns.rows / other.turns.rows,
            Spread.of([ours / theirs for ours, theirs in zip(*rates, strict=True)]),
            one.planned / other.planned,
            saved,
        )

    def as_plain(self) -> dict[str, Any]:
        """The ``--json`` document."""
        settings = self.request.settings
        return {
            "schema": "blockwright.throughput/1",
            "command": self.request.command,
            "memory_bytes": settings.budget,
            "device": str(self.device),
            "clock": "processor" if self.device.type == "cpu" else "wall",
            "threads": settings.threads,
            "dtype": settings.dtype,
            "baseline": self.request.baseline,
            "machine": {str(context): asdict(peaks) for context, peaks in self.peaks.items()},
            "rows": [row.as_plain() for row in self.rows],
            "comparisons": [asdict(each) for change in HEADINGS for each in self.comparisons(change)],
            "claims": [asdict(claim) for claim in self.claims],
        }


def collect(request: Request, arms: Sequence[Arm], device: torch.device, race_at: Callable[[int], Race]) -> Results:
    """Race at every length, and plan what was measured.

    Args:
        request: the command
        arms: checked
        device: that computes
        race_at: context → its race
    """
    rows: list[Row] = []
    peaks: dict[int, Peaks] = {}
    by_name = {arm.name: arm for arm in arms}
    for context in request.settings.context:
        done = race_at(context)
        peaks[context] = _median(done.peaks)
        rows += [
            _row(by_name[c.arm], c, done.turns[c], peaks[context], request, device) for c in cells_of(request, context)
        ]
    return Results(request, device, tuple(rows), peaks, tuple(paper()))


def _median(peaks: Sequence[Peaks]) -> Peaks:
    return Peaks(*(statistics.median(getattr(each, name) for each in peaks) for name in ("flops", "read")))


def _row(arm: Arm, cell: Cell, turns: Turns, peaks: Peaks, request: Request, device: torch.device) -> Row:
    settings = request.settings
    rows = fitting(arm.decoder, settings.budget, cell.context, cell.bits, settings.rows)
    at_most, as_run = (planned(arm.decoder, peaks, n, cell.context, cell.bits) for n in (rows, turns.rows))
    return Row(
        cell,
        arm.weights,
        turns,
        Spread.of(turns.rates(device)),
        rows,
        at_most.tokens_per_second,
        turns.rows / as_run.least_seconds,
    )
