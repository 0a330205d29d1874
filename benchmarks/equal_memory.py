"""Tokens a second of attentions at an equal memory of caches: each decodes as many sequences at once as fit into it.

``python -m benchmarks.equal_memory [MODEL OVERRIDE …]``. A smaller cache makes a step faster and lets more sequences
share the memory: by both, DeepSeek-V2 claims 5.76 times the tokens a second of DeepSeek 67B. Arms are written as for
``blockwright match``. Architecture at equal bits, bits alone, and both are compared apart, beside the roofline of this
machine and what the planner expects of its rates. A model reads one random prompt, and its caches are copied to all
rows, so that every kind of cache holds what decoding gives it; rows continue with tokens of their own.

Left out: prefill, sequences of unequal length, memory besides caches and weights. Weights are untrained, so experts are
visited evenly. A tiny model is far below its roofline: compare at the width that you mean.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from benchmarks import machine, record
from benchmarks.models.base import DTYPES
from benchmarks.race import paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.stopwatch import Peak, seconds_of
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import prefill
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest
from blockwright.lab.match.request import swept
from blockwright.lab.match.sizing import read_arm
from blockwright.plugins.planner.generation import Generation, generation
from blockwright.plugins.planner.hardware import Coefficients, Hardware, coefficients, hardware
from blockwright.registry import ConfigError

ARMS = (
    "model=tiny model.d_model=512 model/ffn=swiglu model.ffn.d_ff=1024 model.layout=null model.variants=null "
    "model/attention=mha,gqa,mqa,mla"
)
STEPS = 4  # of every row, that a turn times
CHUNK = 1024  # tokens of a prompt in one pass, so that a selector's scores of a long one fit
READ = 2**28  # bytes at most that are read to measure the memory; as many as the caches take, if these are fewer
GPU, GPUS, CONTEXT = "h800", 8, 4096  # of the paper's node, and tokens in each cache


class Cell(NamedTuple):
    """An arm, bits of a number in its caches (None for exact ones), and tokens in the cache of each sequence."""

    arm: str
    bits: int | None
    context: int

    def __str__(self) -> str:
        return f"{self.arm}, {'exact' if self.bits is None else f'{self.bits} bits'}"


class FullBatch:
    """Sequences of one length, as many as fit.

    Args:
        decoder: with weights, in evaluation mode
        cell: its context is what each cache has room for, and holds after a turn
        memory: bytes for the caches of all rows
        most: rows at most; needed where a sequence takes nothing

    Attributes:
        row_bytes: bytes allocated for the caches of one row
        rows: B, sequences at once

    Raises:
        ConfigError: one sequence does not fit, or takes nothing, so that any number would
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, cell: Cell, memory: int, most: int | None = None) -> None:
        self.decoder, self.device = decoder, decoder.output_weight.device
        self.draws = torch.Generator().manual_seed(0)
        self._one = decoder.new_caches(1, cell.context, cell.bits)
        prefill(decoder, self._tokens(1, cell.context - STEPS - 1), self._one, CHUNK)
        self.row_bytes = allocated(self._one)
        if self.row_bytes > memory:
            rule = f"is less than the caches of one sequence take ({self.row_bytes:,} bytes: {cell})"
            raise ConfigError("--memory", f"{memory:,} bytes", rule, "Raise it, or shorten --contexts")
        limits = [memory // self.row_bytes] if self.row_bytes else []
        if most is None and not limits:
            raise ConfigError("--rows", None, f"{cell} remembers nothing of a token", "Write --rows 64")
        self.rows = min(limits if most is None else [*limits, most])

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
    def turn(self) -> float:
        """Decode all rows, and drop their caches; returns tokens a second."""
        caches = self.caches()
        tokens = self.step(self._tokens(self.rows, 1), caches)  # kernels and memory are ready after it

        def decode() -> None:
            last = tokens
            for _ in range(STEPS):
                last = self.step(last, caches)

        return self.rows * STEPS / seconds_of(decode, self.device.type)

    def step(self, tokens: torch.Tensor, caches: Sequence[Cache]) -> torch.Tensor:
        """Tokens [B,1] → the likeliest next ones, [B,1]."""
        return prefill(self.decoder, tokens, caches).argmax(-1, keepdim=True)


def allocated(caches: Sequence[Cache]) -> int:
    """Bytes of the memory behind the buffers of caches; each allocation counts once, filled or not."""
    storages = [buffer.untyped_storage() for cache in caches for buffer in cache.buffers.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Raced:
    """A cell as it was measured.

    Args:
        rows, row_bytes: of its full batch
        rates: tokens a second, by round
        plan: of these rows, on a machine of the rates that were measured
    """

    rows: int
    row_bytes: int
    rates: dict[int, float]
    plan: Generation


def race(
    arms: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell], memory: int, given: argparse.Namespace
) -> tuple[dict[Cell, Raced], dict[str, float]]:
    """Give every cell a turn in each round, in the reverse order of the one before; and the machine, in the first.

    Args:
        arms: name → composition
        cells: of all of them
        memory: bytes of caches
        given: the options

    Returns:
        what was measured, and the machine's rates of products and of reading
    """
    dtype = DTYPES[given.dtype]
    decoders = {name: compose(model, device=given.device).to(dtype).eval() for name, model in arms.items()}
    multiply_fastest(*decoders.values())
    numbers = torch.ones(max(1, min(memory, READ) // 4), device=given.device)
    reading = min(seconds_of(lambda: numbers.sum(), given.device) for _ in range(12))
    peaks = {"flops": Peak(given.dtype, given.device).turn()["flops"], "bytes": numbers.nbytes / reading}
    batches = {cell: FullBatch(decoders[cell.arm], cell, memory, given.rows) for cell in cells}
    rates: dict[Cell, dict[int, float]] = {cell: {} for cell in cells}
    for number in range(given.rounds):
        for cell in cells if number % 2 == 0 else reversed(cells):
            rates[cell][number] = batches[cell].turn()
    found = {}
    for cell, batch in batches.items():
        plan = planned(arms[cell.arm], cell, peaks, batch.rows, dtype)
        found[cell] = Raced(batch.rows, batch.row_bytes, rates[cell], plan)
    return found, peaks


def planned(model: Mapping[str, Any], cell: Cell, peaks: Mapping[str, float], rows: int, dtype: Any) -> Generation:
    """The planner's step of a batch on a machine of these rates, which are reached in full."""
    width, (flops, read) = 8 * dtype.itemsize, peaks.values()
    own = Hardware("this machine", flops, flops, math.inf, read, math.inf, math.inf, 1, 0.0, card="none")
    reached = Coefficients(**{field.name: 1.0 for field in fields(Coefficients)})
    bits: dict[str, Any] = {"weight_bits": width, "cache_bits": cell.bits or width}
    return generation(_meta(model, dtype), own, reached, gpus=1, batch=rows, context=cell.context, **bits)


def _meta(model: Mapping[str, Any], dtype: Any) -> Decoder:
    return compose(model, device="meta").to(dtype).eval()


def against(cell: Cell, baseline: str, first: int | None) -> dict[str, Cell]:
    """What changes → the cell in which nothing else does; both, where both do."""
    other = {"architecture": cell._replace(arm=baseline), "bits": cell._replace(bits=first)}
    differs = {change: known for change, known in other.items() if known != cell}
    return differs | ({"both": Cell(baseline, first, cell.context)} if len(differs) == len(other) else {})


def tabulate(found: Mapping[Cell, Raced], baseline: str, first: int | None) -> tuple[list[Table], list[Ratio]]:
    """Full batches beside their plan, and each comparison in tokens a second of the same round."""
    columns = ("arm", "context", "tokens/s", "q1", "q3", "bytes a sequence", "sequences", "of the roofline", "planned")
    batches, ratios = Table("Full batches", columns, plotted="tokens/s"), []
    compared = Table("Compared", ("arm", "against", "changes", "context", "bytes saved", "sequences", "tokens/s"))
    for cell, raced in found.items():
        rate, plan = spread(list(raced.rates.values())), raced.plan
        roofline = raced.rows / plan.least_seconds
        row = [str(cell), cell.context, rate.median, rate.q1, rate.q3, raced.row_bytes, raced.rows]
        batches.rows.append([*row, rate.median / roofline, plan.tokens_per_second])
        for change, other in against(cell, baseline, first).items():
            base = found[other]
            ratio = paired(raced.rates, base.rates)
            assert ratio is not None
            name = f"{cell} ÷ {other} · {cell.context:,} tokens: tokens/s"
            ratios.append(Ratio(name, ratio))
            saved = 1 - raced.row_bytes / base.row_bytes if base.row_bytes else 0.0
            sizes = [f"{saved:.1%}", raced.rows / base.rows, ratio.median]
            compared.rows.append([str(cell), str(other), change, cell.context, *sizes])
    batches.note = (
        "Roofline: the same sequences, if reading and computing overlap at the rates of this machine. Planned: a step "
        "that waits for products, then for attention."
    )
    return [batches, compared], ratios


def claims() -> Table:
    """What the paper claims, and what the planner says of its node."""
    table = Table("The paper's claim", ("", "bytes saved", "sequences", "tokens/s"))
    table.rows.append(["DeepSeek-V2 against DeepSeek 67B, arXiv 2405.04434", "93.3%", None, 5.76])
    models = {name: compose(preset(name), device="meta") for name in ("deepseek_v2", "deepseek_67b")}

    def plan(name: str, weight_bits: int, cache_bits: int) -> Generation:
        bits: dict[str, Any] = {"weight_bits": weight_bits, "cache_bits": cache_bits}
        return generation(models[name], hardware(GPU), coefficients(), gpus=GPUS, context=CONTEXT, **bits)

    quantised, exact, dense = plan("deepseek_v2", 8, 6), plan("deepseek_v2", 16, 16), plan("deepseek_67b", 16, 16)
    for name, one, other in (
        ("V2 with 8-bit weights and 6-bit caches against 67B", quantised, dense),
        ("V2 against 67B, both in 16 bits", exact, dense),
        ("V2 with 8-bit weights and 6-bit caches against 16 bits", quantised, exact),
    ):
        saved = 1 - (one.caches / one.batch) / (other.caches / other.batch)
        speed = one.tokens_per_second / other.tokens_per_second
        table.rows.append([f"planned: {name}", f"{saved:.1%}", one.batch / other.batch, speed])
    table.note = (
        f"Planned for {GPUS} {GPU.upper()} and {CONTEXT:,} tokens. The paper's figure is of serving in production, "
        "where weights take a part of the memory; the batches above fill it with caches alone."
    )
    return table


def main(arguments: Sequence[str] | None = None) -> Result:
    """Race all arms at each precision and length."""
    parser = record.parser("equal_memory", __doc__, rounds=5, minutes=math.inf)
    parser.add_argument("overrides", nargs="*", default=ARMS.split(), help="arms (default: %(default)s)")
    parser.add_argument("--memory", type=record.positive, default=64, help="MiB of all caches (default: %(default)s)")
    parser.add_argument("--bits", type=_precisions, default=[None, 6], help="null, 8, 6, 4; several by comma")
    parser.add_argument("--contexts", type=_lengths, default=[1024, 4096], help="tokens in each cache")
    parser.add_argument("--rows", type=record.positive, help="sequences at most")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of weights and exact caches")
    given = record.read(parser, arguments)
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    if given.quick:
        given.contexts, given.memory = [256], 16
    try:
        arms = {name: read_arm(name, overrides).model for name, overrides in swept(given.overrides).items()}
        for name, model in arms.items():
            if max(given.contexts) > model["max_positions"]:
                rule = f"is longer than arm {name} is made for (model.max_positions = {model['max_positions']})"
                raise ConfigError("--contexts", max(given.contexts), rule, "Shorten it, or raise model.max_positions")
        cells = [Cell(arm, bits, context) for context in given.contexts for bits in given.bits for arm in arms]
        found, peaks = race(arms, cells, given.memory * 2**20, given)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    result = Result("equal_memory", machine.about(given.device, given.threads))
    tables, result.ratios = tabulate(found, next(iter(arms)), given.bits[0])
    result.tables = [*tables, claims()]
    result.raw = {"peaks": peaks, **{f"{cell}, {cell.context}": raced.rates for cell, raced in found.items()}}
    print(result.save(given.out))
    return result


def _precisions(text: str) -> list[int | None]:
    known = {"null": None, "8": 8, "6": 6, "4": 4}
    if not {*text.split(",")} <= {*known}:
        raise argparse.ArgumentTypeError(f"each is one of {', '.join(known)}")
    return [known[word] for word in text.split(",")]


def _lengths(text: str) -> list[int]:
    lengths = [int(word) for word in text.split(",")]
    if min(lengths) < STEPS + 2:
        raise argparse.ArgumentTypeError(f"{STEPS} steps, the one before them and a prompt take {STEPS + 2} tokens")
    return lengths


if __name__ == "__main__":
    main()
