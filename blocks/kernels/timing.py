"""The fastest ways to multiply fp32 matrices on this CPU, timed at the shapes of a model, once, and kept.

Which way is faster depends on the processor, the libraries and the shapes, so it is measured: each way in turn until
its least time falls no more, since other work on a machine only adds time. A time in which other work took a processor
counts as none. A way that is not 1.03 times as fast as torch's own is not chosen, nor is one on a machine so busy that
no time counts. What was found is kept in the user's cache folder, ``$XDG_CACHE_HOME/blockwright`` or
``~/.cache/blockwright``, a file for each processor, torch, number of threads and model; so later processes choose alike
and measure nothing. A file that is damaged or hostile counts as none, a folder that cannot be written keeps none, and
what a busy machine did not tell is measured again by the next process.

``BLOCKWRIGHT_PRODUCTS=torch`` measures nothing, in any command: everything is then torch's own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.kernels.attention import into_latents, latent_attention, out_of_latents
from blockwright.blocks.kernels.products import (
    CACHED,
    FULL_FP32,
    MANY,
    Choice,
    Faster,
    Precision,
    by_mkl,
    error_of_medium,
    few,
    use,
    using,
)
from blockwright.blocks.kernels.seam import implementations
from blockwright.blocks.precision import matmul_precision
from blockwright.registry import ConfigError
from blockwright.registry.folder import parse_json, replaced
from blockwright.registry.limits import read_plain

VARIABLE = "BLOCKWRIGHT_PRODUCTS"
TORCH, AUTO = "torch", "auto"
CLEARLY = 1.03  # times as fast as torch's own
ROUNDS = 4  # after which a least time that fell no more has settled
PATIENCE = 1.0  # seconds for that, of a measurement
ROWS = (1, 4, 8)  # of few-row products; a choice holds for as many and fewer
READ = 48 * 2**20  # bytes of matrices that a pass over a model reads, beyond the caches of most processors
LARGEST = 2  # matrices of a model that are timed with many rows, those with the most multiplications
MULTIPLICATIONS = 2**27  # of a product of many rows
TALL = (512, 2048)  # rows
LEAST = 2**12  # numbers; smaller matrices take as long as the call
HEADS, HEAD, LATENT, ROTATED, KEYS = 16, 64, 256, 32, 2048  # of the attention to latents that is timed
MAX_BYTES = 20_000  # of a file

Matrices = Mapping[tuple[int, int], int]  # outputs and inputs → how many there are
Timed = Callable[[str, Callable[[], object]], float]  # name of a way, and what it computes → seconds; inf: disturbed


def multiply_fastest(*models: nn.Module) -> None:
    """Multiply in this process as is fastest for these models, on the device of the first.

    Raises:
        ConfigError: the environment variable holds something else
    """
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    use(fastest(matrices(*models)) if device.type == "cpu" else Choice(), device.type)


def matrices(*models: nn.Module) -> Matrices:
    """The shapes of all fp32 matrices that rows are multiplied with: of linear layers, the head, and experts."""
    counted, seen = Counter[tuple[int, int]](), set[int]()
    for module in (module for model in models for module in model.modules()):
        own = module._parameters
        found: list[Tensor] = [p for p in own.values() if p is not None and p.ndim == 3]
        found += [own["weight"]] if isinstance(module, nn.Linear) and own["weight"] is not None else []
        head = getattr(module, "output_weight", None)
        found += [head] if isinstance(head, Tensor) else []
        for p in (p for p in found if p.dtype == torch.float32 and p.shape[-1] * p.shape[-2] >= LEAST):
            counted[p.shape[-2], p.shape[-1]] += (p.shape[0] if p.ndim == 3 else 1) * (id(p) not in seen)
            seen.add(id(p))
    return dict(counted)


def fastest(of: Matrices, matmul: Precision | None = None) -> Choice:
    """The fastest ways: those that are kept, or else measured now.

    Args:
        of: the matrices of a model
        matmul: the precision of large products, where it is settled
    """
    if allowed() == TORCH or not of:
        return Choice(matmul or "highest")
    found = kept(of, matmul)
    if found is None:
        mine = measure(of, seconds, matmul)
        found = kept(of, matmul)  # of a job beside this one, which was faster
        if found is None:
            found = mine
            if all(each.ratio for each in found.found):
                _keep(found, of, matmul)
    return found


def allowed() -> str:
    """``auto`` or ``torch``, by the environment.

    Raises:
        ConfigError: neither
    """
    said = os.environ.get(VARIABLE) or AUTO
    if said not in (AUTO, TORCH):
        raise ConfigError(VARIABLE, said, f"is {AUTO} or {TORCH}", f"Write {VARIABLE}={TORCH} to measure nothing")
    return said


# --- measured ---------------------------------------------------------------------------------------------------------


def seconds(way: str, work: Callable[[], object]) -> float:
    """How long some work takes, without what other processes take meanwhile; inf if that is not known."""
    fine = time.get_clock_info("thread_time").resolution < 1e-6
    alone = fine and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    lost, start = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, clock()
    work()
    took = max(clock() - start, 1e-9)
    return took if alone or resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == lost else math.inf


def least(ways: Mapping[str, Sequence[Callable[[], object]]], timed: Timed) -> dict[str, list[float]]:
    """The least seconds that each way takes for each of its works, all in turn until no sum falls by a hundredth.

    inf where other work disturbed all of them. There are two rounds at least, since oneDNN compiles in the first.
    """
    found = {way: [math.inf] * len(works) for way, works in ways.items()}
    settled = rounds = 0
    start = time.monotonic()
    while settled < ROUNDS and (rounds < 2 or time.monotonic() - start < PATIENCE):
        rounds += 1
        before = {way: sum(spent) for way, spent in found.items()}
        for way, works in ways.items():
            found[way] = [min(spent, timed(way, work)) for spent, work in zip(found[way], works, strict=True)]
        settled = settled + 1 if all(0.99 * before[way] <= sum(spent) < math.inf for way, spent in found.items()) else 0
    return found


def _ratio(usual: float, own: float) -> float:
    """Seconds of the usual way ÷ of another; 0 where one of them could not be measured."""
    return usual / own if max(usual, own) < math.inf else 0.0


@torch.no_grad()
def measure(of: Matrices, timed: Timed, matmul: Precision | None = None) -> Choice:
    """Time each way.

    Args:
        of: the matrices of a model
        timed: takes the time, ``seconds``
        matmul: the precision of large products, where it is settled
    """
    found: list[Faster] = []
    if matmul is None:
        matmul = "highest"
        if torch.backends.mkldnn.is_available() and error_of_medium() < FULL_FP32:
            found.append(_large(of, timed))
            matmul = "medium" if found[0].ratio >= CLEARLY else "highest"
    with using(Choice(matmul)):
        read = _read(of)
        by_rows = {rows: _few(read, rows, timed) for rows in ROWS}
        cached = _cached(matmul, timed)
    chosen = {rows: [each for each in by_rows[rows] if each.ratio >= CLEARLY] for rows in ROWS}
    order = {rows: tuple(each.way for each in sorted(chosen[rows], key=lambda e: -e.ratio)) for rows in ROWS}
    found += [*(each for rows in ROWS for each in by_rows[rows]), *cached]
    return Choice(matmul, order, any(each.ratio >= CLEARLY for each in cached), tuple(found))


def _large(of: Matrices, timed: Timed) -> Faster:
    """oneDNN against torch's library, in products of many rows and in those of their gradients."""
    products, shares = list[tuple[Tensor, Tensor]](), list[float]()
    for n, k in sorted(of, key=lambda shape: -shape[0] * shape[1] * of[shape])[:LARGEST]:
        rows = min(max(MULTIPLICATIONS // (n * k), TALL[0]), TALL[1])
        n, share = _cut(n, rows * k, MULTIPLICATIONS, of[n, k])
        x, weight, grad = (torch.ones(shape, dtype=torch.float32) for shape in ((rows, k), (n, k), (rows, n)))
        products += [(x, weight.t()), (grad, weight), (grad.t(), x)]
        shares += [share] * 3

    def under(precision: str, work: Callable[[], object]) -> float:
        with matmul_precision(precision):
            return timed(precision, work)

    spent = least({way: [partial(torch.mm, *each) for each in products] for way in ("highest", "medium")}, under)
    took = {way: sum(share * each for share, each in zip(shares, spent[way], strict=True)) for way in spent}
    usual = "MKL" if torch.backends.mkl.is_available() else "BLAS"
    return Faster(MANY, "oneDNN", usual, _ratio(took["highest"], took["medium"]))


def _read(of: Matrices) -> list[tuple[Tensor, float]]:
    """Matrices of a model, each with how many it stands for; of a large model fewer and lower ones.

    They are read one after the other, as in decoding, so that a large model's come from memory here too.
    """
    less, found = max(1.0, sum(4 * n * k * count for (n, k), count in of.items()) / READ), list[tuple[Tensor, float]]()
    for (n, k), count in of.items():
        height, share = _cut(n, 4 * k, READ // 4, count)
        copies = max(1, round(count / less))
        found += [(torch.ones(height, k, dtype=torch.float32), share / copies) for _ in range(copies)]
    return found


def _few(read: Sequence[tuple[Tensor, float]], rows: int, timed: Timed) -> list[Faster]:
    """Each implementation of ``linear`` against torch's, over the matrices that it takes."""
    ways = {name: each for name, each in implementations("linear").items() if each.runs_on("cpu", (0, 0))}
    given = [torch.ones(rows, weight.shape[1], dtype=torch.float32) for weight, _ in read]
    taken = {
        name: [i for i, (w, _) in enumerate(read) if way.takes is None or way.takes(given[i], w, None)]
        for name, way in ways.items()
    }
    works = {name: [partial(ways[name].call, given[i], read[i][0], None) for i in taken[name]] for name in ways}
    spent = {name: dict(zip(taken[name], each, strict=True)) for name, each in least(works, timed).items()}
    found = []
    for name in (name for name in ways if name != TORCH and taken[name]):
        usual, own = (sum(read[i][1] * spent[way][i] for i in taken[name]) for way in (TORCH, name))
        found.append(Faster(few(rows), name, TORCH, _ratio(usual, own)))
    return found


def _cut(n: int, a_row: int, most: int, count: int) -> tuple[int, float]:
    """Fewer rows of a matrix that is too large, and how many such there are."""
    fewer = min(n, max(64, most // a_row // 64 * 64))
    return fewer, count * n / fewer


def _cached(matmul: Precision, timed: Timed) -> list[Faster]:
    """A token's queries on cached latents, by MKL and as large products are multiplied."""
    if matmul == "highest" or not torch.backends.mkl.is_available():  # all products are MKL's, or none is
        return []
    shapes = (1, 1, HEADS, HEAD), (1, 1, HEADS, ROTATED), (1, KEYS, LATENT + ROTATED), (HEADS, HEAD, LATENT)
    q, rotated, memory, up = (torch.ones(shape, dtype=torch.float32) for shape in shapes)

    def work() -> None:
        given = torch.cat((into_latents(q, up), rotated), -1)
        out_of_latents(latent_attention(given, memory, KEYS, LATENT, 1.0), up)

    def by(way: str, work: Callable[[], object]) -> float:
        mkl = way != TORCH
        with using(Choice(matmul, cached=mkl)), by_mkl() if mkl else nullcontext():
            return timed(way, work)

    spent = least({TORCH: [work], "mkl": [work]}, by)
    return [Faster(CACHED, "mkl", TORCH, _ratio(*spent[TORCH], *spent["mkl"]))]


# --- kept -------------------------------------------------------------------------------------------------------------


def kept(of: Matrices, matmul: Precision | None = None) -> Choice | None:
    """What was measured before; None if nothing was, or its file is damaged."""
    key, file = _key_and_file(of, matmul)
    try:
        found = parse_json(read_plain(file, "cache", "Remove it", MAX_BYTES).decode(), str(file)) if file else None
    except (ConfigError, OSError, UnicodeDecodeError):
        return None
    return Choice.read(found.get("choice")) if isinstance(found, dict) and found.get("key") == key else None


def _keep(choice: Choice, of: Matrices, matmul: Precision | None) -> None:
    key, file = _key_and_file(of, matmul)
    if file is None:
        return
    with suppress(OSError):  # then later processes measure again
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replaced(file) as partial_file:
            partial_file.write_text(json.dumps({"key": key, "choice": choice.as_plain()}, indent=1))


def _key_and_file(of: Matrices, matmul: Precision | None) -> tuple[dict[str, Any], Path | None]:
    """All that a choice depends on, and where it is kept; no file where there is no home."""
    key = {
        "processor": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "matmul": matmul or AUTO,
        "ways": sorted(implementations("linear")),
        "matrices": [[n, k, count] for (n, k), count in sorted(of.items())],
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return key, None if (folder := _folder()) is None else folder / f"{name}.json"


def _folder() -> Path | None:
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):  # no home
        return (asked if asked.is_absolute() else Path.home() / ".cache") / "blockwright" / "products"
    return None


@cache
def processor() -> str:
    """The name of this machine's processor, with its model where the name is a family's."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return ", ".join(fields[name] for name in named if name in fields) or platform.processor() or platform.machine()
