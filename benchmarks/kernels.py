"""Kernels, forward and backward: grouped experts, attention, the loss.

``python -m benchmarks.kernels``. Functions are timed alternately within one process with best settings, in shifting
order; experts against one dense product of the same FLOPs and the peers, attention against other calls of SDPA.
The loss runs in one process per implementation, to measure its own peak memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.stopwatch import peaks, turns
from benchmarks.worker import peak_memory, reset_peak

EXPERT_GRID = [(E, k, T) for E in (8, 64) for k in (2, 6) for T in (512, 4096, 16384)]
EXPERT_BOUND, EXPERT_LIMIT, EXPERT_CELLS = 1.5, 2.0, 0.75  # times a dense product: 3 of 4 cells, all cells
ATTENTION: dict[str, Sequence[int]] = {  # batch, length, heads, width of keys, width of values
    "V2-Lite's heads, T 2048": (1, 2048, 16, 192, 128),
    "small's heads, T 512": (8, 512, 8, 96, 64),
    "small's heads, T 256": (8, 256, 8, 96, 64),
}
LOSSES = {"V 8192": (4096, 8192), "V 102400": (4096, 102400)}  # tokens, vocabulary
QUICK_GRID = [(4, 2, 64)]
QUICK_ATTENTION: dict[str, Sequence[int]] = {"T 32": (1, 32, 2, 24, 16)}
QUICK_LOSSES = {"V 512": (64, 512)}


class Experts:
    """Job: time one cell of the experts' grid at a time."""

    def __init__(self, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, cell: Sequence[int], budget: float, shift: int) -> dict[str, Any]:
        """Seconds of each implementation."""
        from benchmarks.works import grouped_experts

        works, flops = grouped_experts(cell, self.dtype, self.device)
        return {"flops": flops, "seconds": turns(works, self.device, budget=budget, shift=shift)}


class Attention:
    """Job: time attention at one size at a time."""

    def __init__(self, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, cell: Sequence[int], budget: float, shift: int) -> dict[str, Any]:
        """Seconds of each implementation."""
        from benchmarks.works import attention

        works, flops = attention(cell, self.dtype, self.device)
        return {"flops": flops, "seconds": turns(works, self.device, budget=budget, shift=shift)}


class Loss:
    """Job: compute the loss with one implementation, measuring memory."""

    def __init__(self, way: str, tokens: int, vocabulary: int, dtype: str, device: str) -> None:
        from benchmarks.works import loss

        works, self.flops = loss(tokens, vocabulary, dtype, device)
        self.works, self.device = {way: works[way]}, device
        self.before = peak_memory(device)
        reset_peak(device)

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, budget: float, shift: int) -> dict[str, Any]:
        """Seconds, and peak memory above what the process held before."""
        seconds = turns(self.works, self.device, budget=budget, shift=shift)
        return {"flops": self.flops, "seconds": seconds, "peak_bytes": max(0, peak_memory(self.device) - self.before)}


def experts_table(
    rounds: Sequence[dict[str, Any]], cells: Sequence[Sequence[int]], dtype: str
) -> tuple[Table, list[Ratio]]:
    """A row per cell: GFLOP/s of each implementation, ours relative to the dense product and to the best peer."""
    from benchmarks.works import EXPERTS

    columns = [
        "cell",
        *(f"{name}, GFLOP/s" for name in EXPERTS),
        "ours ÷ dense, time",
        "q1",
        "q3",
        "best peer ÷ ours, time",
    ]
    table, ratios = Table(f"Experts · {dtype}", columns, plotted="ours ÷ dense, time"), []
    promised = set(cells) <= set(EXPERT_GRID)
    for cell in cells:
        name = "E {} · k {} · T {}".format(*cell)
        seconds = {way: {r: turn[name]["seconds"][way] for r, turn in enumerate(rounds)} for way in EXPERTS}
        speed = [rounds[0][name]["flops"] / spread(list(s.values())).median / 1e9 for s in seconds.values()]
        slowdown = paired(seconds["ours"], seconds["one dense product"])
        peers = [way for way in EXPERTS if way not in ("ours", "one dense product")]
        best = {r: min(seconds[way][r] for way in peers) for r in seconds["ours"]}
        lead = paired(best, seconds["ours"])
        assert slowdown is not None and lead is not None
        table.rows.append([name, *speed, slowdown.median, slowdown.q1, slowdown.q3, lead.median])
        ratios.append(
            Ratio(
                f"experts · {dtype} · {name}: ours ÷ dense, time", slowdown, "less", EXPERT_LIMIT if promised else None
            )
        )
        ratios.append(
            Ratio(f"experts · {dtype} · {name}: best peer ÷ ours, time", lead, bound=1.0 if promised else None)
        )
    return table, ratios


def attention_table(
    rounds: Sequence[dict[str, Any]], cells: dict[str, Sequence[int]], dtype: str
) -> tuple[Table, list[Ratio]]:
    """A row per size and implementation."""
    table = Table(f"Attention · {dtype}", ("way", "size", "GFLOP/s", "q1", "q3", "its time ÷ ours"), plotted="GFLOP/s")
    ratios = []
    for name in cells:
        flops = rounds[0][name]["flops"]
        seconds = {
            way: {r: turn[name]["seconds"][way] for r, turn in enumerate(rounds)} for way in rounds[0][name]["seconds"]
        }
        for way, found in seconds.items():
            speed = spread([flops / s / 1e9 for s in found.values()])
            lead = paired(found, seconds["ours"])
            assert lead is not None
            table.rows.append([way, name, speed.median, speed.q1, speed.q3, lead.median])
            if way != "ours":
                ratios.append(Ratio(f"attention · {dtype} · {name}: {way} ÷ ours, time", lead))
    return table, ratios


def _in_turns(
    job: str, dtype: str, cells: dict[str, Sequence[int]], given: Any, seconds: float
) -> list[dict[str, Any]]:
    """Run rounds over all cells in one process: per round, cell → result."""
    import time

    rounds: list[dict[str, Any]] = []
    entry = Entry(f"{job} {dtype}", f"benchmarks.kernels:{job}", {"dtype": dtype}, tuned=True)
    started = time.monotonic()
    with Race([entry], given.device, given.threads) as race:
        while len(rounds) < given.rounds and (len(rounds) < _least(given) or time.monotonic() - started < seconds):
            found = {}
            for name, cell in cells.items():
                turn = {"cell": cell, "budget": given.cell_seconds, "shift": len(rounds)}
                found[name] = race.ask(entry, turn)
            if entry.failed is not None:
                raise SystemExit(f"{job}, {dtype}: {entry.failed}")
            rounds.append(found)
            print(f"{job} {dtype}: round {len(rounds)}, {time.monotonic() - started:.0f} s", flush=True)
    return rounds


def _least(given: Any) -> int:
    return 1 if given.quick else 3


def losses_table(losses: dict[str, tuple[int, int]], dtype: str, given: Any) -> tuple[Table, list[Ratio]]:
    """Speed and memory of the loss."""
    columns = ("way", "size", "GFLOP/s", "q1", "q3", "memory above inputs, MB", "all logits in fp32, MB")
    table, ratios = Table(f"Loss · {dtype}", columns, plotted="GFLOP/s"), []
    for name, (tokens, vocabulary) in losses.items():
        sizes = {"tokens": tokens, "vocabulary": vocabulary, "dtype": dtype}
        ways = ("ours", "logits held whole")
        entries = [Entry(way, "benchmarks.kernels:Loss", {"way": way, **sizes}, tuned=True) for way in ways]
        with Race(entries, given.device, given.threads) as race:
            race.run(given.rounds, 10, least=_least(given), budget=given.cell_seconds, shift=0)
        if any(entry.failed for entry in entries):
            raise SystemExit(f"loss, {dtype}, {name}: {next(e.failed for e in entries if e.failed)}")
        for entry in entries:
            speed = spread([t["flops"] / t["seconds"][entry.label] / 1e9 for t in entry.turns.values()])
            memory = max(t["peak_bytes"] for t in entry.turns.values()) / 1e6
            row = [entry.label, name, speed.median, speed.q1, speed.q3, memory, tokens * vocabulary * 4 / 1e6]
            table.rows.append(row)
        ours, theirs = ({r: t["seconds"][e.label] for r, t in e.turns.items()} for e in entries)
        lead = paired(theirs, ours)
        assert lead is not None
        ratios.append(Ratio(f"loss · {dtype} · {name}: logits held whole ÷ ours, time", lead))
    return table, ratios


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the requested parts; a result per part."""
    parser = record.parser("kernels", __doc__, rounds=5, minutes=7)
    record.add_names(parser, "parts", "experts,attention,loss", ("experts", "attention", "loss"))
    record.add_names(parser, "dtypes", "fp32,bf16", ("fp32", "bf16"))
    parser.add_argument("--cell-seconds", type=float, default=0.6, help="a cell in a round (default: %(default)s)")
    given = record.read(parser, arguments)
    given.cell_seconds = 0.01 if given.quick else given.cell_seconds
    results = {part: Result(f"kernels_{part}", machine.about(given.device, given.threads)) for part in given.parts}
    grid: dict[str, Sequence[int]] = {
        "E {} · k {} · T {}".format(*c): c for c in (QUICK_GRID if given.quick else EXPERT_GRID)
    }
    heads = QUICK_ATTENTION if given.quick else ATTENTION
    for dtype in given.dtypes:
        share = given.minutes * 60 / len(given.dtypes)
        # The matmul peak, for reference
        with Race(peaks(dtype, given.device), given.device, given.threads) as race:
            race.run(2, 0, least=2)
        rows = [[e.label, max(t["flops"] for t in e.turns.values()) / 1e9] for e in race.entries if e.turns]
        peak = Table(f"Matmul peak · {dtype}", ("settings", "GFLOP/s"), rows)
        for part, result in results.items():
            result.tables.append(peak)
            if part == "loss":
                _add(result, dtype, [], *losses_table(QUICK_LOSSES if given.quick else LOSSES, dtype, given))
                continue
            known = grid if part == "experts" else heads
            cells = {n: c for n, c in known.items() if record.wanted(f"{part} · {dtype} · {n}", given.only)}
            rounds = _in_turns(part.capitalize(), dtype, cells, given, (0.8 if part == "experts" else 0.1) * share)
            if part == "experts":
                _add(result, dtype, rounds, *experts_table(rounds, list(cells.values()), dtype))
            else:
                _add(result, dtype, rounds, *attention_table(rounds, cells, dtype))
            result.save(given.out)
    if "experts" in results:
        _add_share(results["experts"])
    for result in results.values():
        print(result.save(given.out))
    return list(results.values())


def _add_share(result: Result) -> None:
    """Add the share of cells near a dense product; promised for the whole grid in both dtypes."""
    found = [ratio.spread.median for ratio in result.ratios if "ours ÷ dense, time" in ratio.name]
    if not found:  # --only chooses cells of other parts
        return
    share = spread([sum(median <= EXPERT_BOUND for median in found) / len(found)])
    bound = EXPERT_CELLS if len(found) == 2 * len(EXPERT_GRID) else None
    result.ratios.append(Ratio(f"experts: share of cells within {EXPERT_BOUND} of dense", share, bound=bound))


def _add(result: Result, name: str, raw: Any, table: Table, ratios: list[Ratio]) -> None:
    result.tables.append(table)
    result.ratios += ratios
    result.raw[name] = raw


if __name__ == "__main__":
    main()
