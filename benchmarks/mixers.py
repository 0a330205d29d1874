"""One layer's token mixer, forward and backward, at growing lengths, and its decoding at growing contexts.

``python -m benchmarks.mixers``. Attention, a window and the recurrent mixers at the width of the default model, one
sequence, in one process that times them alternately. Beside the delta mixers the same blocks with the recurrence of
flash-linear-attention's plain PyTorch reference, whose files alone are read: ``pip install --no-deps fla-core einops``.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, Spread, paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.stopwatch import seconds_of, turns

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"attention": "mha", "position": "rope"},
    "window 512": {"attention": {"name": "sliding_window", "window": 512}, "position": "rope"},
    "gated_delta": {"attention": "gated_delta"},
    "kda": {"attention": "kda"},
    "mamba2": {"attention": "mamba2"},
    "lightning": {"attention": "lightning"},
}
REFERENCES = {"gated_delta": "gated_delta_rule", "kda": "kda"}  # block → folder of fla's reference
LENGTHS, CONTEXTS = (1024, 4096, 16384), (1024, 4096, 16384, 65536)
WIDTH = 192  # of the default model
LEAD, FLAT = 2.0, 0.1  # at least so many times the reference's speed; at most so much from the shortest context


class Layers:
    """Job: time the mixers at one length at a time."""

    def __init__(self, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device

    def about(self) -> dict[str, Any]:
        return {"missing": missing()}

    def turn(self, length: int, budget: float, shift: int) -> dict[str, Any]:
        """Seconds of each, forward and backward."""
        import torch

        from benchmarks.models.base import DTYPES
        from benchmarks.works import training
        from blockwright.blocks.forward_pass import Pass

        torch.manual_seed(0)
        kind = DTYPES[self.dtype]
        x = torch.randn(1, length, WIDTH, device=self.device).to(kind).requires_grad_()
        positions = torch.arange(length, device=self.device)[None]
        works = {}
        for name, block in blocks(self.device, kind).items():
            works[name] = training(lambda block=block: block(x, Pass(positions)), x, *block.parameters())
        return {"seconds": turns(works, self.device, budget=budget, shift=shift)}


class Decoding:
    """Job: time one token after a context that each mixer has read."""

    def __init__(self, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, context: int, steps: int, shift: int) -> dict[str, Any]:
        """Median seconds of a token of each."""
        import torch

        from benchmarks.models.base import DTYPES
        from blockwright.blocks.forward_pass import Pass

        kind, found = DTYPES[self.dtype], {}
        for name, block in blocks(self.device, kind, references=False).items():
            torch.manual_seed(0)
            with torch.inference_mode():
                cache = block.new_cache(1, context + steps + 1, kind, torch.device(self.device))
                for at in range(0, context, 1024):
                    given = torch.randn(1, min(1024, context - at), WIDTH, device=self.device).to(kind)
                    block(given, Pass(torch.arange(at, at + given.shape[1], device=self.device)[None], cache=cache))
                times = []
                for at in range(context, context + steps + 1):
                    given, place = given[:, :1], torch.full((1, 1), at, device=self.device)
                    times.append(seconds_of(lambda: block(given, Pass(place, cache=cache)), self.device))  # noqa: B023
                found[name] = spread(times[1:]).median
        return {"seconds": found}


def missing() -> str | None:
    """Why the references cannot be had; None if they can."""
    try:
        distribution("fla-core")
    except PackageNotFoundError:
        return "fla-core is not installed: pip install --no-deps fla-core einops"
    return None if importlib.util.find_spec("einops") else "einops is not installed: pip install einops"


def blocks(device: str, dtype: Any, references: bool = True) -> dict[str, Any]:
    """The mixers, and those with fla's plain recurrence in place of ours."""
    import copy

    from blockwright.blocks.compose import compose

    around: dict[str, Any] = {"vocab_size": 8, "d_model": WIDTH, "n_layers": 1, "max_positions": 2 * CONTEXTS[-1]}
    around |= {"ffn": {"name": "swiglu", "d_ff": 8}, "norm": "rmsnorm", "residual": "prenorm", "position": "none"}
    made: dict[str, Any] = {}
    for name, node in MIXERS.items():
        made[name] = compose({**around, **node}, seed=0).to(device, dtype).layers[0].attention
        if references and name in REFERENCES and missing() is None:
            made[f"{name}, fla's reference"] = other = copy.deepcopy(made[name])
            other.kernels = _with(other.kernels, _reference(name))
    return made


def _with(kernels: Any, recur: Callable[..., Any]) -> Any:
    """Kernels with another recurrence."""
    from blockwright.blocks.kernels.seam import Implementation

    own = Implementation("reference of fla", recur, (), None, None, None, False, 0)
    return replace(kernels, chains={**kernels.chains, "recurrence": (own,)})


def _reference(name: str) -> Callable[..., Any]:
    """fla's chunked recurrence in plain PyTorch, with our arguments; its package as a whole needs Triton."""
    folder = REFERENCES[name]
    file = distribution("fla-core").locate_file(f"fla/ops/{folder}/naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder}", str(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = getattr(module, f"naive_chunk_{folder}")

    def recur(q: Any, k: Any, v: Any, decay: Any, beta: Any, *_: Any) -> tuple[Any, Any]:
        g = decay if name == "kda" else decay[..., 0]
        y, _ = theirs(q=q, k=k, v=v, g=g, beta=beta, scale=1.0)
        return y, None

    return recur


def layers_table(rounds: Sequence[Mapping[int, Any]], dtype: str) -> tuple[Table, list[Ratio]]:
    """A row per length and mixer, and our delta mixers against the references."""
    columns = ("mixer", "length", "ms", "q1", "q3", "attention's time ÷ its", "its reference's time ÷ its")
    table, ratios = Table(f"Forward and backward of a layer · {dtype}", columns), []
    ahead: dict[str, int] = {}
    for length in rounds[0]:
        seconds = {n: {r: t[length]["seconds"][n] for r, t in enumerate(rounds)} for n in rounds[0][length]["seconds"]}
        for name, found in seconds.items():
            ms = spread([1e3 * s for s in found.values()])
            against, lead = paired(seconds["attention"], found), None
            if (reference := seconds.get(f"{name}, fla's reference")) is not None:
                lead = paired(reference, found)
                assert lead is not None
                about = f"{name} · {dtype} · {length:,} tokens: fla's plain reference ÷ ours, time"
                ratios.append(Ratio(about, lead, bound=LEAD if length in LENGTHS else None))
            assert against is not None
            if against.median > 1:
                ahead.setdefault(name, length)
            table.rows.append([name, length, ms.median, ms.q1, ms.q3, against.median, lead.median if lead else None])
    said = [f"{name} from {ahead[name]:,}" if name in ahead else f"{name} at none" for name in MIXERS]
    table.note = f"Faster than attention, of the lengths here: {'; '.join(said[1:])}."
    return table, ratios


def decoding_table(rounds: Sequence[Mapping[int, Any]], dtype: str) -> tuple[Table, list[Ratio]]:
    """A row per mixer: a token's time at each context, and how far it strays from the shortest one's."""
    contexts = list(rounds[0])
    table = Table(
        f"Decoding, µs a token · {dtype}", ("mixer", *(f"{c:,} tokens" for c in contexts), "longest ÷ shortest")
    )
    ratios = []
    for name in rounds[0][contexts[0]]["seconds"]:
        seconds = {c: {r: t[c]["seconds"][name] for r, t in enumerate(rounds)} for c in contexts}
        grown = paired(seconds[contexts[-1]], seconds[contexts[0]])
        assert grown is not None
        table.rows.append([name, *(1e6 * spread(list(s.values())).median for s in seconds.values()), grown.median])
        strays = [abs(found.median - 1) for c in contexts if (found := paired(seconds[c], seconds[contexts[0]]))]
        if name not in ("attention", "window 512"):
            worst = Spread(max(strays), max(strays), max(strays), len(rounds))
            bound = FLAT if contexts == list(CONTEXTS) else None
            ratios.append(
                Ratio(f"{name} · {dtype}: change of a token's time with context", worst, "less", bound, False)
            )
    return table, ratios


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run both parts for each dtype."""
    parser = record.parser("mixers", __doc__, rounds=5, minutes=8)
    record.add_names(parser, "dtypes", "fp32", ("fp32", "bf16"))
    given = record.read(parser, arguments)
    lengths, contexts = ((64,), (64, 128)) if given.quick else (LENGTHS, CONTEXTS)
    result = Result("mixers", machine.about(given.device, given.threads))
    for dtype in given.dtypes:
        share = 30 * given.minutes / len(given.dtypes)  # seconds of each part
        layers = _rounds(
            "Layers", dtype, [{"length": n, "budget": 0.0 if given.quick else 2.0} for n in lengths], given, share
        )
        decoding = _rounds(
            "Decoding", dtype, [{"context": n, "steps": 3 if given.quick else 60} for n in contexts], given, share
        )
        for made in (layers_table(layers, dtype), decoding_table(decoding, dtype)):
            result.tables.append(made[0])
            result.ratios += made[1]
        result.raw[dtype] = {"layers": layers, "decoding": decoding}
    print(result.save(given.out))
    return result


def _rounds(job: str, dtype: str, cells: Sequence[dict[str, Any]], given: Any, seconds: float) -> list[dict[int, Any]]:
    """Rounds over all lengths in one process."""
    rounds: list[dict[int, Any]] = []
    entry, started = Entry(f"{job} {dtype}", f"benchmarks.mixers:{job}", {"dtype": dtype}), time.monotonic()
    with Race([entry], given.device, given.threads) as race:
        if why := entry.about.get("missing"):
            print(f"without the references: {why}", flush=True)
        least = 1 if given.quick else 3
        while len(rounds) < given.rounds and (len(rounds) < least or time.monotonic() - started < seconds):
            found = {}
            for cell in cells:
                found[next(iter(cell.values()))] = race.ask(entry, {**cell, "shift": len(rounds)})
                if entry.failed is not None:
                    raise SystemExit(f"{job}, {dtype}: {entry.failed}")
            rounds.append(found)
            print(f"{job} {dtype}: round {len(rounds)}, {time.monotonic() - started:.0f} s", flush=True)
    return rounds


if __name__ == "__main__":
    main()
