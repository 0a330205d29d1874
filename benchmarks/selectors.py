"""A layer whose queries see few of many keys: chosen keys gathered, against all scores with the others hidden.

``python -m benchmarks.selectors``. Each attention with its selector computes a token, and a part of a prompt, behind
growing contexts, in turn by either way, and beside it the same attention without a selector. Contexts are random: what
is chosen is, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.stopwatch import seconds_of

DSA = {"name": "dsa", "n_heads": 16, "head_dim": 64, "top_k": 1024}
HEADS = {"n_heads": 16, "head_dim": 64}
ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name → attention, what chooses among its keys
    "mla, dsa": ({"name": "mla", "n_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, {"selector": DSA}),
    "gqa, dsa": ({"name": "gqa", **HEADS, "n_kv_heads": 4}, {"selector": DSA}),
    "shared_kv, csa": (
        {"name": "shared_kv", **HEADS},
        {"compressor": {"name": "csa", "n_heads": 16, "head_dim": 64, "top_k": 256}},
    ),
}
WIDTH, CONTEXTS, PROMPT = 1024, (4096, 16384, 65536), 128  # tokens of a part of a prompt
WAYS = ("gathered", "all scores", "no selector")


class Layer:
    """Job: time one attention behind a context."""

    def __init__(self, attention: str, dtype: str, device: str) -> None:
        self.attention, self.dtype, self.device = attention, dtype, device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, context: int, steps: int) -> dict[str, Any]:
        """Median seconds of a token and of a part of a prompt, by each way."""
        import torch

        from benchmarks.models.base import DTYPES
        from blockwright.blocks.forward_pass import Pass

        kind, device = DTYPES[self.dtype], torch.device(self.device)
        torch.manual_seed(0)
        own, chooses = ATTENTIONS[self.attention]
        plain, chosen = (_layer(node, context, device, kind) for node in (own, {**own, **chooses}))
        found: dict[str, dict[str, list[float]]] = {what: {way: [] for way in WAYS} for what in ("token", "prompt")}
        with torch.inference_mode():
            caches = {layer: _filled(layer, context, device, kind) for layer in (plain, chosen)}
            for what, tokens in (("token", 1), ("prompt", PROMPT)):
                for step in range(steps + 1):
                    x = torch.randn(1, tokens, WIDTH, device=device).to(kind)
                    at = step % len(WAYS)
                    for way in WAYS[at:] + WAYS[:at]:
                        layer = plain if way == "no selector" else chosen
                        cache = caches[layer]
                        places = torch.arange(cache.length, cache.length + tokens, device=device)[None]
                        with _gathering(way == "gathered"):
                            took = seconds_of(lambda: layer(x, Pass(places, cache=cache)), self.device)  # noqa: B023
                        found[what][way].append(took)
        return {what: {way: spread(took[1:]).median for way, took in ways.items()} for what, ways in found.items()}


def _layer(attention: Mapping[str, Any], context: int, device: Any, dtype: Any) -> Any:
    from blockwright.blocks.compose import compose

    around: dict[str, Any] = {"vocab_size": 8, "d_model": WIDTH, "n_layers": 1, "max_positions": 4 * context}
    around |= {"ffn": {"name": "swiglu", "d_ff": 8}, "norm": "rmsnorm", "residual": "prenorm", "position": "rope"}
    return compose({**around, "attention": dict(attention)}, seed=0).to(device, dtype).layers[0].attention


def _filled(layer: Any, context: int, device: Any, dtype: Any) -> Any:
    """A cache of a random context; of means of windows, which only the layer can make, it reads one."""
    import torch

    from blockwright.blocks.cache.base import Cache
    from blockwright.blocks.forward_pass import Pass

    cache = layer.new_cache(1, 2 * context + 100 * PROMPT, dtype, device)
    if type(cache) is Cache:
        shapes = [slot[:, :0].shape for slot in cache.read(slice(0, 0))]
        cache.store(*(torch.randn(1, context, *shape[2:], device=device).to(dtype) for shape in shapes))
        return cache
    for start in range(0, context, 1024):
        given = torch.randn(1, min(1024, context - start), WIDTH, device=device).to(dtype)
        layer(given, Pass(torch.arange(start, start + given.shape[1], device=device)[None], cache=cache))
    return cache


@contextmanager
def _gathering(gathers: bool) -> Iterator[None]:
    """Chosen keys are gathered where they are few, or never."""
    from blockwright.blocks.kernels import long_attention

    least = long_attention.LEAST
    long_attention.LEAST = least if gathers else 2**60
    try:
        yield
    finally:
        long_attention.LEAST = least


def tabulate(rounds: Sequence[Mapping[str, Any]], dtype: str) -> tuple[Table, list[Ratio]]:
    """A row per attention, work and context."""
    columns = ("attention", "work", "behind", *(f"{way}, ms" for way in WAYS), "all scores ÷ gathered")
    table, ratios = Table(f"Few of many keys · {dtype}", columns), []
    for cell in rounds[0]:
        name, context = cell.rsplit(" ", 1)
        for what in ("token", "prompt"):
            seconds = {way: {r: found[cell][what][way] for r, found in enumerate(rounds)} for way in WAYS}
            gain = paired(seconds["all scores"], seconds["gathered"])
            assert gain is not None
            ms = [1e3 * spread(list(found.values())).median for found in seconds.values()]
            table.rows.append([name, what, int(context), *ms, gain.median])
            about = f"{name} · {dtype} · a {what} behind {int(context):,}: all scores ÷ gathered, time"
            ratios.append(Ratio(about, gain, bound=1.0 if int(context) == CONTEXTS[-1] else None))
    table.note = f"A prompt is {PROMPT} tokens of it. Width {WIDTH}, 16 heads; dsa sees 1,024 tokens, csa 256 windows."
    return table, ratios


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run all attentions for each dtype."""
    parser = record.parser("selectors", __doc__, rounds=5, minutes=10)
    record.add_names(parser, "dtypes", "fp32", ("fp32", "bf16"))
    given = record.read(parser, arguments)
    contexts, steps = ((8,), 1) if given.quick else (CONTEXTS, 11)
    result = Result("selectors", machine.about(given.device, given.threads))
    for dtype in given.dtypes:
        entries = [Entry(n, "benchmarks.selectors:Layer", {"attention": n, "dtype": dtype}) for n in ATTENTIONS]
        cells = {
            f"{entry.label} {context}": (entry, {"context": context, "steps": steps})
            for entry in entries
            for context in contexts
        }
        with Race(entries, given.device, given.threads) as race:
            rounds = race.run_cells(cells, given.rounds, 60 * given.minutes / len(given.dtypes), least=3)
        table, ratios = tabulate(rounds, dtype)
        result.tables.append(table)
        result.ratios += ratios
        result.raw[dtype] = rounds
    print(result.save(given.out))
    return result


if __name__ == "__main__":
    main()
