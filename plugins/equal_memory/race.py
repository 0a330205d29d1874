"""Rounds in which every arm, at every precision, and the machine itself have a turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import prefill
from blockwright.plugins.equal_memory.arm import Cell
from blockwright.plugins.equal_memory.request import Settings

# --- seconds of some work: by the clock on the wall, and of the processor that this process had -----------------------


@dataclass(frozen=True)
class Seconds:
    """What some work took.

    Args:
        processor: CPU-seconds of all threads of this process
        wall: seconds that passed
    """

    processor: float
    wall: float

    def __truediv__(self, times: int) -> Seconds:
        return Seconds(self.processor / times, self.wall / times)

    def on(self, device: torch.device) -> float:
        """Those that count: of the processor if it computes, since other programs then change little, else all."""
        return self.processor if device.type == "cpu" else self.wall


def timed(work: Callable[[], object], device: torch.device) -> Seconds:
    """Time one call, and everything that it starts on the device."""
    _wait(device)
    start = Seconds(time.process_time(), time.perf_counter())
    work()
    _wait(device)
    return Seconds(time.process_time() - start.processor, time.perf_counter() - start.wall)


def unit(device: torch.device) -> str:
    """What tokens are counted by."""
    return "CPU-second" if device.type == "cpu" else "second"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what a machine reaches in the two things that decoding waits for: products, and reading memory -------------------


WIDTH = {"cpu": 1024, "cuda": 8192}  # of a square product that is large for the device
READ = 2**28  # bytes at most that are read at once; as many as the caches take, if these are fewer
WORK = {"cpu": 2e9, "cuda": 2e12}  # FLOPs or bytes of a measurement, at least


@dataclass(frozen=True)
class Peaks:
    """The rates of a machine.

    Args:
        flops: FLOP/s of a large square product
        read: bytes/s of a sum over memory
    """

    flops: float
    read: float


class Machine:
    """Measures the rates of a device, with the threads and the dtype of the arms.

    Args:
        device: that computes
        dtype: of the products
        memory: bytes that decoding reads
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, memory: int) -> None:
        self.device = device
        width = WIDTH[device.type]
        self.square = torch.randn(width, width, device=device, dtype=torch.float32).to(dtype)
        self.numbers = torch.ones(max(1, min(memory, READ) // 4), device=device, dtype=torch.float32)

    def turn(self) -> Peaks:
        """Measure both once."""
        return Peaks(
            self._rate(lambda: self.square @ self.square, 2 * len(self.square) ** 3),
            self._rate(lambda: self.numbers.sum(), self.numbers.nbytes),
        )

    def _rate(self, work: Callable[[], object], amount: int) -> float:
        """Amount a second, after a call that warms up."""
        times = int(-(-WORK[self.device.type] // amount))
        work()
        return amount * times / timed(lambda: [work() for _ in range(times)], self.device).on(self.device)


# --- a batch of as many sequences as fit into a memory of caches, decoded step by step --------------------------------


SEED = 0  # of prompts and first tokens
CHUNK = 1024  # tokens of a prompt in one pass, so that a selector's scores of a long one fit


def allocated(caches: Sequence[Cache]) -> int:
    """Bytes of the memory behind the buffers of caches; each allocation counts once, filled or not."""
    storages = [buffer.untyped_storage() for cache in caches for buffer in cache.buffers.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class FullBatch:
    """Sequences of one length, as many as fit.

    The model reads one random prompt, so that every kind of cache, state and choice of keys holds what decoding gives
    it. A turn copies its caches to all rows, which then continue with tokens of their own.

    Args:
        decoder: with weights, in evaluation mode
        cell: its context is what each cache has room for, and holds after a turn
        settings: bytes of the caches of all rows, rows at most, and tokens of every row that a turn times

    Attributes:
        row_bytes: bytes allocated for the caches of one row
        rows: B, sequences at once
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, cell: Cell, settings: Settings) -> None:
        self.decoder, self.steps = decoder, settings.steps
        self.device = decoder.output_weight.device
        self.draws = torch.Generator().manual_seed(SEED)
        self._one = decoder.new_caches(1, cell.context, cell.bits)
        prefill(decoder, self._tokens(1, cell.context - self.steps - 1), self._one, CHUNK)
        self.row_bytes = allocated(self._one)
        limits = [settings.budget // self.row_bytes] if self.row_bytes else []
        self.rows = min(limits if settings.rows is None else [*limits, settings.rows])

    def _tokens(self, rows: int, count: int) -> torch.Tensor:
        drawn = torch.randint(self.decoder.config["vocab_size"], (rows, count), generator=self.draws)
        return drawn.to(self.device)

    def caches(self) -> list[Cache]:
        """Caches of all rows, one step and those that are timed before they are full."""
        caches = copy.deepcopy(self._one)
        for cache in caches:
            cache.take(torch.zeros(self.rows, dtype=torch.int64, device=self.device))
        return caches

    @torch.inference_mode()
    def turn(self) -> tuple[Seconds, int]:
        """Decode all rows, and drop their caches.

        Returns:
            seconds of a step, and the bytes allocated for the caches of all rows
        """
        caches, tokens = self.caches(), self._tokens(self.rows, 1)
        tokens = self._step(tokens, caches)  # kernels and memory are ready after it

        def decode() -> None:
            last = tokens
            for _ in range(self.steps):
                last = self._step(last, caches)

        return timed(decode, self.device) / self.steps, allocated(caches)

    def _step(self, tokens: torch.Tensor, caches: Sequence[Cache]) -> torch.Tensor:
        """Tokens [B,1] → the likeliest next ones, [B,1]."""
        return prefill(self.decoder, tokens, caches).argmax(-1, keepdim=True)


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
