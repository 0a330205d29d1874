"""A decoding step of attention with an exact cache, and with 8, 6 and 4 bits whose codes are read or dequantised first.

``python -m benchmarks.codes``. One process holds caches of several layers, so that they do not all stay in the
processor's own, and computes one token of each layer by every way in turn: projections, storing the token, attention.
CPU seconds of the process: other processes on the machine do not count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, paired, spread
from benchmarks.record import Ratio, Result, Table

ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"name": "gqa", "n_heads": 8, "n_kv_heads": 2, "head_dim": 64},
    "mha": {"name": "mha", "n_heads": 8, "head_dim": 64},
    "mla": {
        "name": "mla",
        "n_heads": 8,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
}
WIDTH, ROWS, CONTEXTS = 512, (1, 8), (256, 1024, 2048, 4096, 8192)
LAYERS, HELD = (2, 12), 2**28  # the fewest and the most layers; bytes of their exact caches
# Name → bits, and what `task.kernels.coded_attention` is
WAYS: dict[str, tuple[int | None, str]] = {
    "exact": (None, "auto"),
    **{f"{bits} bits": (bits, "auto") for bits in (8, 6, 4)},
    "6 bits by torch": (6, "parts"),
    "6 bits dequantised": (6, "whole"),
}
FROM = 2048  # tokens, from which on codes are promised not to be slower


class Layers:
    """Job: time the attentions of some layers behind a context."""

    def __init__(self, attention: str, dtype: str, device: str) -> None:
        self.attention, self.dtype, self.device = attention, dtype, device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, rows: int, context: int, steps: int) -> dict[str, Any]:
        """CPU seconds of a step of one layer, by each way, step by step."""
        import torch

        from benchmarks.models.base import DTYPES
        from blockwright.blocks.forward_pass import Pass

        dtype = DTYPES[self.dtype]
        torch.manual_seed(0)
        decoder = _decoder(self.attention, context + steps + 2, dtype)
        layer, found = decoder.layers[0].attention, dict[str, list[float]]()
        x = torch.randn(rows, 1, WIDTH, dtype=torch.float32).to(dtype)
        with torch.inference_mode():
            caches = {bits: _caches(layer, rows, context, steps, dtype, bits) for bits in (None, 8, 6, 4)}
            for step in range(steps + 1):
                ways = list(WAYS.items())
                for way, (bits, kernel) in ways[step % len(ways) :] + ways[: step % len(ways)]:
                    if kernel == "parts" and self.attention == "mla":  # which it does not take
                        continue
                    decoder.choose_kernels({"coded_attention": kernel})
                    began = time.process_time()
                    for cache in caches[bits]:
                        cache.length = context + step
                        layer(x, Pass(torch.full((1, 1), cache.length), cache=cache))
                    found.setdefault(way, []).append((time.process_time() - began) / len(caches[bits]))
        return {way: took[1:] for way, took in found.items()}


def _decoder(attention: str, length: int, dtype: Any) -> Any:
    from blockwright.blocks.compose import compose

    around: dict[str, Any] = {"vocab_size": 8, "d_model": WIDTH, "n_layers": 1, "max_positions": length}
    around |= {"ffn": {"name": "swiglu", "d_ff": 8}, "norm": "rmsnorm", "residual": "prenorm", "position": "rope"}
    return compose({**around, "attention": ATTENTIONS[attention]}, seed=0).to(dtype).eval()


def _caches(layer: Any, rows: int, context: int, steps: int, dtype: Any, bits: int | None) -> list[Any]:
    """Of several layers, with the same random context."""
    import torch

    def empty(bits: int | None) -> Any:
        return layer.new_cache(rows, context + steps + 1, dtype, torch.device("cpu"), bits)

    exact = empty(None)
    shapes = [slot.shape[2:] for slot in exact.read(slice(0, 0))]
    n = min(max(LAYERS[0], HELD // exact.nbytes), LAYERS[1])
    made = [empty(bits) for _ in range(n)]
    for start in range(0, context, 256):
        some = [torch.randn(rows, min(256, context - start), *shape).to(dtype) for shape in shapes]
        made[0].store(*some)
    for cache in made[1:]:
        cache.take_over(made[0])
    return made


def tabulate(rounds: Sequence[Mapping[str, Any]], dtype: str) -> tuple[Table, list[Ratio]]:
    """A row per attention, batch and context."""
    columns = ("attention", "rows", "context", *(f"{way}, ms" for way in WAYS), "exact ÷ 6 bits", "quartiles")
    table, ratios = Table(f"A step of attention · {dtype}", columns), []
    for cell in rounds[0]:
        name, rows, context = cell.split(" ")
        steps = [found[cell] for found in rounds]
        taken = {way: [t for found in steps for t in found.get(way, ())] for way in WAYS}
        gains = {way: paired(dict(enumerate(taken["exact"])), dict(enumerate(took))) for way, took in taken.items()}
        gain = gains["6 bits"]
        assert gain is not None
        ms = [1e3 * spread(took).median if took else None for took in taken.values()]
        table.rows.append([name, int(rows), int(context), *ms, gain.median, f"{gain.q1:.2f} to {gain.q3:.2f}"])
        for way, found in gains.items():
            if way != "exact" and found is not None:
                bound = 1.0 if way in ("8 bits", "6 bits", "4 bits") and int(context) >= FROM else None
                about = f"{name} · {dtype} · {rows} rows of {int(context):,}: exact ÷ {way}, CPU time"
                ratios.append(Ratio(about, found, bound=bound))
    table.note = (
        f"Of one layer of width {WIDTH}: 8 heads of 64, gqa with 2 of keys and values, mla with latents of 512 and 64. "
        "Medians over steps; ratios are of the same step."
    )
    return table, ratios


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run all attentions, batches and contexts."""
    parser = record.parser("codes", __doc__, rounds=3, minutes=10)
    parser.set_defaults(threads=1)
    record.add_names(parser, "dtypes", "fp32", ("fp32", "bf16"))
    given = record.read(parser, arguments)
    shapes = [(1, 8)] if given.quick else [(rows, context) for rows in ROWS for context in CONTEXTS]
    steps = 1 if given.quick else len(WAYS)
    result = Result("codes", machine.about(given.device, given.threads))
    for dtype in given.dtypes:
        names = [name for name in ATTENTIONS if record.wanted(name, given.only)]
        entries = [Entry(name, "benchmarks.codes:Layers", {"attention": name, "dtype": dtype}) for name in names]
        cells = {
            f"{entry.label} {rows} {context}": (entry, {"rows": rows, "context": context, "steps": steps})
            for entry in entries
            for rows, context in shapes
        }
        with Race(entries, given.device, given.threads) as race:
            rounds = race.run_cells(cells, given.rounds, 60 * given.minutes, least=1)
        table, ratios = tabulate(rounds, dtype)
        result.tables.append(table)
        result.ratios += ratios
        result.raw[dtype] = rounds
    print(result.save(given.out))
    return result


if __name__ == "__main__":
    main()
