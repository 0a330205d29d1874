"""A training step, ours and the peers': forward, loss, backward, AdamW, on random tokens.

``python -m benchmarks.train_step``. Each shape, family and dtype is one race with all contenders in every round, and
the machine's matmul peak measured among them. Every contender has its own process, to measure its own peak memory. The
optimizer is torch's fused AdamW for all; in bf16 rows the weights are bf16 too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks import machine, peers, record
from benchmarks.models.base import build
from benchmarks.race import Contender, Entry, Race, Spread, contenders, paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.shapes import FAMILIES, SHAPES, Family, Shape, composition
from benchmarks.stopwatch import peaks, synchronise
from benchmarks.worker import peak_memory, reset_peak

AT_EQUAL_SETTINGS = {  # ours ÷ a peer, in tokens a second, at the shape `small` of a CPU
    ("mla_moe", "fp32"): 1.25,
    ("mla_moe", "bf16"): 1.6,
    ("dense", "fp32"): 1.1,
    ("dense", "bf16"): 1.1,
    ("mixtral", "fp32"): 1.4,
    ("mixtral", "bf16"): 1.4,
}
AS_THEY_COME = 2.0  # ours with best settings ÷ a peer of the family mla_moe with defaults
OF_PEAK = {("cpu", "small", "mla_moe", "fp32"): 0.62, ("cpu", "small", "mla_moe", "bf16"): 0.5}
OF_PEAK |= {("cuda", "lite", "mla_moe", "bf16"): 0.3, ("cuda", "lite", "dense", "bf16"): 0.4}
WARM_STEPS = 2  # experts' rows, and so their memory, differ from step to step
TURN_SECONDS = 1.0  # minimum measured time of a turn
COLUMNS = (
    *("contender", "settings", "tokens/s", "q1", "q3", "of peak", "ours ÷ it, same settings", "ours at best ÷ it"),
    *("peak memory, GB", "first loss", "parameters", "remarks"),
)


class TrainStep:
    """Job of a contender: train, a few steps per turn.

    Args:
        length: tokens of a row; None for the shape's
    """

    def __init__(
        self, shape: str, contender: Mapping[str, Any], dtype: str, device: str, length: int | None = None
    ) -> None:
        import torch

        self.shape, self.device, self.contender = SHAPES[shape], device, Contender(**contender)
        self.shape = replace(self.shape, sequence=length or self.shape.sequence)
        self.model = build(self.contender, self.shape, dtype, device)
        self.model.module.train()
        self.weights = [p for p in self.model.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True) if self.shape.optimizer else None
        self.draws = torch.Generator().manual_seed(1)
        self.losses: list[float] = []
        self.settled = False

    def about(self) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in self.weights)}

    def turn(self, **ignored: Any) -> dict[str, Any]:
        """Train for ``TURN_SECONDS``; the seconds of each step, and peak memory."""
        if not self.settled:
            self._choose()
            if self.contender.compiled:
                self.model.compile()
        # The memory returned while waiting is allocated again in steps that do not count.
        for _ in range(WARM_STEPS if self.contender.tuned else 0 if self.settled else 1):
            self._step()
        if not self.settled:
            self.settled = True
            reset_peak(self.device)
        seconds: list[float] = []
        while sum(seconds) < TURN_SECONDS:
            seconds.append(self._step())
        losses, self.losses = self.losses, []
        found = {"seconds": seconds, "losses": losses, "peak_bytes": peak_memory(self.device)}
        return {**found, "note": self.model.note}

    def _step(self) -> float:
        """One step on new tokens, the same for all contenders; its seconds."""
        import torch

        drawn = torch.randint(
            self.shape.vocab_size, (self.shape.batch, self.shape.sequence + 1), generator=self.draws
        ).to(self.device)
        tokens, targets = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
        synchronise(self.device)
        start = time.perf_counter()
        loss = self.model.loss(tokens, targets)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        for weight in self.weights:
            weight.grad = None
        synchronise(self.device)
        seconds = time.perf_counter() - start
        self.losses.append(float(loss.detach()))
        return seconds

    def _choose(self) -> None:
        """Try each of the library's settings for a step, without the optimizer, and keep the fastest."""
        optimizer, self.optimizer, self.losses = self.optimizer, None, []
        seconds: dict[str, float] = {}
        for choice in self.model.choices():
            self.model.choose(choice)
            self._step()
            seconds[choice] = min(self._step() for _ in range(2))
        if seconds:
            self.model.choose(min(seconds, key=lambda choice: seconds[choice]))
        self.optimizer, self.losses = optimizer, []
        self.draws.manual_seed(1)


def entries(shape: Shape, family: Family, dtype: str, found: Sequence[Contender]) -> list[Entry]:
    """The contenders of one race."""
    return [
        Entry(
            *(c.label, "benchmarks.train_step:TrainStep"),
            {"shape": shape.name, "contender": asdict(c), "dtype": dtype},
            c.tuned,
        )
        for c in found
    ]


def rates(entry: Entry, tokens: int) -> dict[int, float]:
    """Round → tokens per second of its median step."""
    return {index: tokens / spread(turn["seconds"]).median for index, turn in entry.turns.items()}


def flops_per_token(shape: Shape, family: Family) -> int:
    """FLOPs of our training step: three times the forward pass, with half of attention's products, as it is causal.

    The counted products with all keys grow with the length; the mean over a sequence, per token, has half of them.
    """
    from blockwright.blocks.cost import forward_flops_per_token

    model = composition(shape, family)
    return round(1.5 * (forward_flops_per_token(model, shape.sequence) + forward_flops_per_token(model, 1)))


def tabulate(
    shape: Shape, family: Family, dtype: str, device: str, found: Sequence[Contender], race: Race
) -> tuple[Table, list[Ratio]]:
    """The table and the ratios of one race."""
    title = f"{shape.name} · {family} · {dtype}"
    by_label = {entry.label: entry for entry in race.entries}
    peak = {
        e.label: spread([t["flops"] for t in e.turns.values()]) for e in race.entries if "peak" in e.label and e.turns
    }
    best_peak = {index: turn["flops"] for index, turn in by_label["matmul peak, best settings"].turns.items()}
    rate = {c.label: rates(by_label[c.label], shape.tokens) for c in found}
    flops = flops_per_token(shape, family)
    shares = {c.label: paired({r: v * flops for r, v in rate[c.label].items()}, best_peak) for c in found}
    mine = {c.settings: c.label for c in found if c.maker == "ours"}
    table, ratios = Table(title, COLUMNS, plotted="tokens/s"), []
    for c in found:
        entry = by_label[c.label]
        if not rate[c.label]:
            table.rows.append([c.name, c.settings, *[None] * 9, f"failed: {entry.failed}"])
            continue
        pair = {
            "same": paired(rate[mine[c.settings]], rate[c.label]) if c.settings in mine else None,
            "best": paired(rate[mine["best settings"]], rate[c.label]) if "best settings" in mine else None,
        }
        table.rows.append(_row(c, entry, rate[c.label], shares[c.label], pair))
        ratios += _ratios(title, shape, family, dtype, c, pair, by_label.get(mine.get(c.settings, ""), entry), entry)
        key = (device, shape.name, family, dtype)
        if c.maker == "ours" and c.settings == "best settings" and shares[c.label] is not None:
            ratios.append(Ratio(f"{title}: ours ÷ matmul peak", shares[c.label], bound=OF_PEAK.get(key)))  # type: ignore[arg-type]
    words = ", ".join(f"{label.partition(', ')[2]} {p.median / 1e9:.0f} GFLOP/s" for label, p in peak.items())
    step = "forward, backward and AdamW" if shape.optimizer else "forward and backward, no optimizer"
    table.note = (
        f"A step is {step} on {shape.batch} × {shape.sequence} tokens, {flops / 1e6:.0f} MFLOP a token. "
        f"Matmul peak: {words}; the share is of the peak at best settings. Ratios are medians of those within a round."
    )
    return table, ratios


def _row(
    c: Contender, entry: Entry, rate: Mapping[int, float], share: Spread | None, pair: Mapping[str, Any]
) -> list[Any]:
    speed = spread(list(rate.values()))
    memory = max(turn["peak_bytes"] for turn in entry.turns.values()) / 1e9
    start = entry.turns[min(entry.turns)]
    medians = [None if p is None or c.maker == "ours" else p.median for p in (pair["same"], pair["best"])]
    remarks = "; ".join(part for part in (start["note"], f"failed: {entry.failed}" if entry.failed else "") if part)
    return [
        *(c.name, c.settings, speed.median, speed.q1, speed.q3, None if share is None else share.median),
        *(*medians, memory, start["losses"][0], entry.about["parameters"], remarks),
    ]


def _ratios(
    title: str, shape: Shape, family: Family, dtype: str, c: Contender, pair: Mapping[str, Any], ours: Entry, it: Entry
) -> list[Ratio]:
    """Promised and recorded ratios of ours to one peer; promises are for the shape ``small`` only."""
    if c.maker == "ours" or (pair["same"] is None and pair["best"] is None):
        return []
    promised = shape.name == "small"
    found = []
    equal = AT_EQUAL_SETTINGS[family, dtype] if promised else None
    if pair["same"] is not None:
        found.append(Ratio(f"{title}: ours ÷ {c.label}", pair["same"], bound=equal))
        memory = paired(*({r: t["peak_bytes"] for r, t in e.turns.items()} for e in (ours, it)))
        if memory is not None:
            found.append(Ratio(f"{title}: memory of ours ÷ {c.label}", memory, "less", 1.0 if promised else None))
    if c.compiled and pair["best"] is not None:  # compared with ours uncompiled
        found.append(Ratio(f"{title}: ours, best settings ÷ {c.label}", pair["best"], bound=equal))
    if not c.tuned and pair["best"] is not None:
        bound = AS_THEY_COME if promised and family == "mla_moe" else None
        found.append(Ratio(f"{title}: ours, best settings ÷ {c.label}", pair["best"], bound=bound))
    return found


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the requested races; a result per shape and family, saved after each race."""
    parser = record.parser("train_step", __doc__, rounds=7, minutes=8)
    record.add_names(parser, "shapes", "small", list(SHAPES))
    record.add_names(parser, "families", ",".join(FAMILIES), FAMILIES)
    record.add_names(parser, "dtypes", "fp32,bf16", ("fp32", "bf16"))
    parser.add_argument(
        "--compiled", action="store_true", help="also every contender under torch.compile, a minute each"
    )
    parser.add_argument("--older", action="store_true", help="also models that a newer one of the library supersedes")
    given = record.read(parser, arguments)
    shapes = ["smoke"] if given.quick else given.shapes
    races = [
        (SHAPES[name], family, dtype, found)
        for name in shapes
        for family in given.families
        for dtype in (SHAPES[name].dtypes[:1] if given.quick else SHAPES[name].dtypes)
        for found in [_chosen(SHAPES[name], family, dtype, given)]
        if found and dtype in given.dtypes
    ]
    results: dict[str, Result] = {}
    for shape, family, dtype, found in races:
        name = f"train_step_{shape.name}_{family}"
        if name not in results:
            results[name] = Result(name, machine.about(given.device, given.threads))
            kinds = [(f, d) for s, f, d, _ in races if (s, f) == (shape, family)]
            equal = peers.equality("smoke" if given.quick else "tiny", kinds, given.device, given.threads)
            results[name].tables.append(equal)
        seconds = given.minutes * 60 / len(races)
        _race(results[name], shape, family, dtype, found, given.device, given.threads, given.rounds, seconds)
        print(results[name].save(given.out), flush=True)
    return list(results.values())


def _chosen(shape: Shape, family: Family, dtype: str, given: Any) -> list[Contender]:
    title = f"{shape.name} · {family} · {dtype}"
    found = contenders(family, compiled=given.compiled, older=given.older)
    return [c for c in found if record.wanted(f"{title} · {c.label}", given.only)]


def _race(
    result: Result,
    shape: Shape,
    family: Family,
    dtype: str,
    found: Sequence[Contender],
    device: str,
    threads: int,
    rounds: int,
    seconds: float,
) -> None:
    title = f"{shape.name} · {family} · {dtype}"
    print(f"{title}: {len(found)} contenders", flush=True)
    start = time.monotonic()
    with Race([*entries(shape, family, dtype, found), *peaks(dtype, device)], device, threads) as race:
        race.run(rounds, seconds - (time.monotonic() - start), least=1 if seconds == 0 else 2)
    table, ratios = tabulate(shape, family, dtype, device, found, race)
    result.tables.append(table)
    result.ratios += ratios
    result.raw[title] = {e.label: {"about": e.about, "failed": e.failed, "turns": e.turns} for e in race.entries}
    for row in table.rows:
        print("  " + " | ".join(str(v) if not isinstance(v, float) else f"{v:.4g}" for v in row), flush=True)


if __name__ == "__main__":
    main()
