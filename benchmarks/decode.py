"""Decoding token by token from a filled cache, and prefill: ours and the peers'.

``python -m benchmarks.decode``. Caches are filled with random values before timing: the time of a step does not depend
on them, and some peers would take minutes to read 16k tokens. Prefill is timed on a real prompt. All contenders use
their best settings; ``--as-they-come`` adds their defaults.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine, record
from benchmarks.models.base import DTYPES, build
from benchmarks.race import Contender, Entry, Race, Spread, contenders, paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.shapes import SHAPES, Shape
from benchmarks.stopwatch import synchronise
from benchmarks.worker import peak_memory, reset_peak

CONTEXTS, BATCHES, PROMPTS = (128, 2048, 8192, 16384), (1, 8), (2048, 8192)
STEPS = 40  # maximum per turn
SLOW = 8.0  # contenders with longer turns (seconds) run in two rounds only
SHARE_OF_MEMORY = 0.8  # for a cache and the copy that some peers make of it
PROMISED = {  # at 8k tokens of context: ours ÷ a library's latent attention, tokens a second
    ("transformers", 1): 6.0,
    ("litgpt", 1): 2.0,
    ("transformers", 8): 8.0,
    ("litgpt", 8): 8.0,
}
PREFILL = 3.0  # times transformers' latent attention
DENSE = 1.05  # times a library's Llama, by our dense model, in every cell
EQUAL = 1e-5  # difference between decoded and full-pass logits, relative to the largest


class Decode:
    """Job of a contender: fill a cache and decode, or read a prompt."""

    def __init__(self, shape: str, contender: Mapping[str, Any], dtype: str, device: str) -> None:
        import torch

        self.shape, self.contender, self.dtype, self.device = SHAPES[shape], Contender(**contender), dtype, device
        self.model = build(self.contender, self.shape, dtype, device)
        self.model.module.eval()
        self.draws = torch.Generator().manual_seed(1)
        self.best: dict[tuple[str, int], str | None] = {}

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, kind: str, context: int, batch: int, seconds: float) -> dict[str, Any]:
        """``decode``: seconds per step; ``prefill``: seconds per prompt; ``check``: deviation of decoding."""
        import torch

        with torch.inference_mode():
            self._choose(kind, batch)
            work = {"decode": self._decode, "prefill": self._prefill, "check": self._check}[kind]
            return {**work(context, batch, seconds), "note": self.model.note}

    def _choose(self, kind: str, batch: int) -> None:
        """Choose the library's fastest setting, which differs between decoding and prefill."""
        if (kind, batch) not in self.best:
            took: dict[str, float] = {}
            for choice in self.model.choices(decoding=kind == "decode"):
                self.model.choose(choice)
                tries = self._prefill(256, batch, 0)["seconds"] if kind == "prefill" else self._steps(64, batch, 0.3)
                took[choice] = min(tries)
            self.best[kind, batch] = min(took, key=lambda choice: took[choice]) if took else None
        best = self.best[kind, batch]
        if best is not None:
            self.model.choose(best)

    def _decode(self, context: int, batch: int, seconds: float) -> dict[str, Any]:
        token = self._cache_bytes(8, 1) // 8
        if self.device == "cpu" and 2 * token * batch * context > SHARE_OF_MEMORY * free_memory():
            return {"skipped": f"a cache of {token * batch * context / 1e9:.1f} GB does not fit"}
        # Ours is allocated at full size, to compare with the formula; others grow per token.
        own = self.contender.maker == "ours"
        held = self._cache_bytes(context, batch) if own else token * batch * context
        found = self._steps(context, batch, seconds)
        self.model.begin(1, 8)  # do not keep a large cache while waiting
        return {"seconds": found, "cache_bytes": held}

    def _cache_bytes(self, context: int, batch: int) -> int:
        """Bytes of a filled cache for so many tokens."""
        self.model.begin(batch, context)
        self.model.fill(context)
        return self.model.cache_bytes()

    def _steps(self, context: int, batch: int, seconds: float) -> list[float]:
        """Seconds of each step after ``context`` tokens, at least two, the first not counted."""
        import torch

        with torch.inference_mode():
            self.model.begin(batch, context + STEPS + 1)
            self.model.fill(context)
            found: list[float] = []
            while len(found) < 3 or (sum(found[1:]) < seconds and len(found) < STEPS):
                token = self._tokens(batch, 1)
                synchronise(self.device)
                start = time.perf_counter()
                self.model.step(token)
                synchronise(self.device)
                found.append(time.perf_counter() - start)
        return found[1:]

    def _prefill(self, context: int, batch: int, seconds: float) -> dict[str, Any]:
        prompt = self._tokens(batch, context)
        self.model.begin(batch, context)
        reset_peak(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        self.model.prefill(prompt)
        synchronise(self.device)
        found = {"seconds": [time.perf_counter() - start], "peak_bytes": peak_memory(self.device)}
        self.model.begin(1, 8)
        return found

    def _check(self, context: int, batch: int, seconds: float) -> dict[str, Any]:
        """Decoding after a prompt, compared with prompts that are one token longer each time."""
        tokens = self._tokens(batch, context)
        self.model.begin(batch, context)
        self.model.prefill(tokens[:, : context // 2])
        worst = 0.0
        decoded = [self.model.step(tokens[:, i : i + 1]) for i in range(context // 2, context)]
        for i, logits in zip(range(context // 2, context), decoded, strict=True):
            if i % 8 == 0 or i == context - 1:
                self.model.begin(batch, context)
                whole = self.model.prefill(tokens[:, : i + 1])
                worst = max(worst, float((logits - whole).abs().max() / whole.abs().max()))
        return {"difference": worst}

    def _tokens(self, batch: int, length: int) -> Any:
        import torch

        return torch.randint(self.shape.vocab_size, (batch, length), generator=self.draws).to(self.device)


def free_memory() -> float:
    """Bytes of available memory; unlimited if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


Turns = dict[str, dict[int, dict[str, Any]]]  # label → round → turn


def _rounds(race: Race, cells: Sequence[tuple[str, int, int]], given: Any) -> dict[tuple[str, int, int], Turns]:
    """Every contender at every cell in every round, within the time limit."""
    found: dict[tuple[str, int, int], Turns] = {cell: {e.label: {} for e in race.entries} for cell in cells}
    started = time.monotonic()
    for index in range(given.rounds):
        if index >= 2 and time.monotonic() - started > given.minutes * 60:
            break
        for cell in cells:
            kind, context, batch = cell
            for entry in race.order(index):
                earlier = found[cell][entry.label]
                if index >= 2 and (not earlier or sum(earlier[max(earlier)].get("seconds", [0.0])) > SLOW):
                    continue
                turn = {"kind": kind, "context": context, "batch": batch, "seconds": given.cell_seconds}
                answer = race.ask(entry, turn)
                if answer is not None:
                    earlier[index] = answer
            print(f"round {index + 1}, {kind} {context} × {batch}: {time.monotonic() - started:.0f} s", flush=True)
    return found


def rates(turns: Mapping[int, dict[str, Any]], tokens: int) -> dict[int, float]:
    """Round → tokens per second, from the median step of a turn."""
    return {r: tokens / spread(turn["seconds"]).median for r, turn in turns.items() if "seconds" in turn}


def formula(shape: Shape, contender: Contender, batch: int, context: int, dtype: str) -> int:
    """Bytes that our cache must have."""
    from benchmarks.models.blockwright import cache_formula

    return cache_formula(shape, contender.family, batch, context, DTYPES[dtype])


def tabulate(
    shape: Shape, dtype: str, found: Sequence[Contender], race: Race, cells: Mapping[tuple[str, int, int], Turns]
) -> tuple[list[Table], list[Ratio]]:
    """A table of decoding, one of prefill, and the ratios."""
    title = f"{shape.name} · {dtype}"
    columns = ("contender", "settings", "context", "tokens/s", "q1", "q3", "ours ÷ it")
    decoding = Table(
        f"Decoding · {title}",
        ("contender", "settings", "context × batch", *columns[3:], "cache bytes a token", "remarks"),
        plotted="tokens/s",
    )
    reading = Table(f"Prefill · {title}", (*columns, "peak memory, GB", "remarks"), plotted="tokens/s")
    ratios: list[Ratio] = []
    mine = next(c for c in found if c.maker == "ours" and c.family == "mla_moe" and c.tuned)
    for (kind, context, batch), turns in cells.items():
        if kind == "check":
            continue
        tokens = batch if kind == "decode" else batch * context
        rate = {label: rates(t, tokens) for label, t in turns.items()}
        for c in found:
            entry = next(e for e in race.entries if e.label == c.label)
            lead = paired(rate[mine.label], rate[c.label]) if c is not mine else None
            table = decoding if kind == "decode" else reading
            where = f"{context} × {batch}" if kind == "decode" else context
            own = turns[c.label]
            table.rows.append(_row(c, entry, where, own, rate[c.label], lead, kind, batch * context))
            if lead is not None:
                name = f"{kind} · {title} · {where}: ours ÷ {c.label}"
                ratios.append(Ratio(name, lead, bound=_bound(shape, dtype, c, kind, context, batch)))
            if c.family == "dense" and c.maker != "ours" and c.tuned:
                ours = next((o.label for o in found if o.maker == "ours" and o.family == "dense" and o.tuned), "")
                if (like := paired(rate.get(ours, {}), rate[c.label])) is not None:
                    bound = DENSE if (shape.name, dtype) == ("small", "fp32") else None
                    ratios.append(Ratio(f"{kind} · {title} · {where}: ours dense ÷ {c.label}", like, bound=bound))
            if c.maker == "ours" and kind == "decode" and own:
                due = formula(shape, c, batch, context, dtype)
                off = abs(own[max(own)]["cache_bytes"] / due - 1)
                name = f"{kind} · {title} · {where}: cache bytes of {c.name}, off their formula"
                ratios.append(Ratio(name, spread([off]), "less", 0.0))
    return [table for table in (decoding, reading) if table.rows], ratios


def _row(
    c: Contender,
    entry: Entry,
    where: Any,
    turns: Mapping[int, dict[str, Any]],
    rate: Mapping[int, float],
    lead: Spread | None,
    kind: str,
    tokens: int,
) -> list[Any]:
    skipped = next((turn["skipped"] for turn in turns.values() if "skipped" in turn), "")
    notes = {turn.get("note", ""): None for turn in turns.values()}
    parts = (*notes, skipped, f"failed: {entry.failed}" if entry.failed else "")
    remarks = "; ".join(part for part in parts if part)
    if not rate:
        return [c.name, c.settings, where, None, None, None, None, None, remarks]
    speed, last = spread(list(rate.values())), turns[max(turns)]
    memory = last["cache_bytes"] / tokens if kind == "decode" else last["peak_bytes"] / 1e9
    return [
        *(c.name, c.settings, where, speed.median, speed.q1, speed.q3),
        *(None if lead is None else lead.median, memory, remarks),
    ]


def _bound(shape: Shape, dtype: str, c: Contender, kind: str, context: int, batch: int) -> float | None:
    """The promised ratio to a contender with best settings, for `small` in fp32."""
    if shape.name != "small" or dtype != "fp32" or not c.tuned:
        return None
    if kind == "prefill":
        return PREFILL if c.maker == "transformers" and c.family == "mla_moe" else None
    if c.family == "dense":
        return 1.0 if context >= 2048 else None
    return PROMISED.get((c.maker, batch)) if context == 8192 else None


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the requested cells; a result per shape and dtype."""
    parser = record.parser("decode", __doc__, rounds=5, minutes=5)
    record.add_names(parser, "shapes", "small", list(SHAPES))
    record.add_names(parser, "dtypes", "fp32", ("fp32", "bf16"))
    parser.add_argument("--cells", metavar="TEXT", help="e.g. 'decode 8192' or 'prefill'; several by comma")
    parser.add_argument("--as-they-come", action="store_true", help="also transformers and ours without best settings")
    parser.add_argument("--cell-seconds", type=float, default=0.5, help="of steps in a turn (default: %(default)s)")
    given = record.read(parser, arguments)
    results = []
    contexts, batches, prompts = ((16, 32), (1, 2), (32,)) if given.quick else (CONTEXTS, BATCHES, PROMPTS)
    given.cell_seconds = 0.0 if given.quick else given.cell_seconds
    for name in ["smoke"] if given.quick else given.shapes:
        for dtype in given.dtypes:
            shape, found = SHAPES[name], _contenders(given)
            result = Result(f"decode_{name}_{dtype}", machine.about(given.device, given.threads))
            cells = [("decode", context, batch) for batch in batches for context in contexts]
            cells += [("prefill", prompt, 1) for prompt in prompts]
            cells = [c for c in cells if record.wanted(f"{c[0]} {c[1]} {c[2]}", given.cells)]
            arguments_of = {"shape": name, "dtype": dtype}
            entries = [
                Entry(c.label, "benchmarks.decode:Decode", {**arguments_of, "contender": asdict(c)}, c.tuned)
                for c in found
            ]
            with Race(entries, given.device, given.threads) as race:
                _check(result, race, shape, dtype)
                turns = _rounds(race, cells, given)
            tables, ratios = tabulate(shape, dtype, found, race, turns)
            result.tables += tables
            result.ratios += ratios
            result.raw[f"{name} {dtype}"] = {" ".join(map(str, cell)): t for cell, t in turns.items()}
            print(result.save(given.out), flush=True)
            results.append(result)
    return results


def _contenders(given: Any) -> list[Contender]:
    """Ours and the peers that can decode, the latent ones first."""
    found = [c for family in ("mla_moe", "dense") for c in contenders(family)]
    found = [c for c in found if c.maker != "x-transformers"]
    found = [c for c in found if c.tuned or (given.as_they_come and c.maker != "litgpt")]
    mine = [c for c in found if c.maker == "ours" and c.family == "mla_moe"]
    return mine + [c for c in found if c not in mine and record.wanted(c.label, given.only)]


def _check(result: Result, race: Race, shape: Shape, dtype: str) -> None:
    """Check that decoding equals one pass."""
    columns = ("contender", "largest difference of logits, as a fraction of the largest logit")
    table = Table(f"Decoded against one pass · {shape.name} · {dtype}", columns)
    for entry in race.entries:
        if entry.label.startswith("ours"):
            answer = race.ask(entry, {"kind": "check", "context": 96, "batch": 2, "seconds": 0})
            if answer is None:
                raise SystemExit(f"{entry.label}: {entry.failed}")
            table.rows.append([entry.label, answer["difference"]])
            bound = EQUAL if dtype == "fp32" else None
            difference = spread([answer["difference"]])
            result.ratios.append(
                Ratio(f"decode · {shape.name} · {dtype}: {entry.label}, off", difference, "less", bound)
            )
    result.tables.append(table)


if __name__ == "__main__":
    main()
