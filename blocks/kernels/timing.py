"""The fastest ways to multiply fp32 matrices on this CPU, timed at the shapes of a model, once, and kept.

Which way is faster depends on the processor, the libraries and the shapes, so it is measured: each way a few times in
turn, of which the least counts, since other work on a machine only adds time. A way that is not 1.03 times as fast as
torch's own is not chosen. What was found is kept in the user's cache folder, ``$XDG_CACHE_HOME/blockwright`` or
``~/.cache/blockwright``, a file for each processor, torch, number of threads and model; so later processes choose alike
and measure nothing. A file that is damaged or hostile counts as none, and a folder that cannot be written keeps none.

``BLOCKWRIGHT_PRODUCTS=torch`` measures nothing, in any command: everything is then torch's own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.kernels.latent_attention import into_latents, latent_attention, out_of_latents
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
from blockwright.registry.folder import parse_json
from blockwright.registry.limits import read_plain
from blockwright.registry.replacing import replaced

VARIABLE = "BLOCKWRIGHT_PRODUCTS"
TORCH, AUTO = "torch", "auto"
CLEARLY = 1.03  # times as fast as torch's own
ROUNDS = 4
ROWS = (1, 4, 8)  # of few-row products; a choice holds for as many and fewer
READ = 48 * 2**20  # bytes of matrices that a pass over a model reads, beyond the caches of most processors
LARGEST = 2  # matrices of a model that are timed with many rows, those with the most multiplications
MULTIPLICATIONS = 2**27  # of a product of many rows
TALL = (512, 2048)  # rows
LEAST = 2**12  # numbers; smaller matrices take as long as the call
HEADS, HEAD, LATENT, ROTATED, KEYS = 16, 64, 256, 32, 2048  # of the attention to latents that is timed
MAX_BYTES = 20_000  # of a file

Matrices = Mapping[tuple[int, int], int]  # outputs and inputs → how many there are
Timed = Callable[[str, Callable[[], object]], float]  # name of a way, and what it computes → seconds


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
    """How long some work takes; of a single thread without what other processes take meanwhile."""
    fine = time.get_clock_info("thread_time").resolution < 1e-6
    clock = time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return max(clock() - start, 1e-9)


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
    took = dict.fromkeys(("highest", "medium"), 0.0)
    for n, k in sorted(of, key=lambda shape: -shape[0] * shape[1] * of[shape])[:LARGEST]:
        rows = min(max(MULTIPLICATIONS // (n * k), TALL[0]), TALL[1])
        n, share = _cut(n, rows * k, MULTIPLICATIONS, of[n, k])
        x, weight, grad = (torch.ones(shape, dtype=torch.float32) for shape in ((rows, k), (n, k), (rows, n)))
        for a, b in ((x, weight.t()), (grad, weight), (grad.t(), x)):
            least = dict.fromkeys(took, math.inf)
            for _ in range(1 + ROUNDS):  # oneDNN compiles in the first
                for precision in least:
                    with matmul_precision(precision):
                        least[precision] = min(least[precision], timed(precision, partial(torch.mm, a, b)))
            took = {precision: spent + share * least[precision] for precision, spent in took.items()}
    usual = "MKL" if torch.backends.mkl.is_available() else "BLAS"
    return Faster(MANY, "oneDNN", usual, took["highest"] / took["medium"])


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
    least = {name: [math.inf] * len(read) for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            for i, (x, (weight, _)) in enumerate(zip(given, read, strict=True)):
                if way.takes is None or way.takes(x, weight, None):
                    least[name][i] = min(least[name][i], timed(name, partial(way.call, x, weight, None)))
    found = []
    for name in (name for name in ways if name != TORCH):
        taken = [i for i, spent in enumerate(least[name]) if spent < math.inf]
        usual, own = (sum(read[i][1] * least[way][i] for i in taken) for way in (TORCH, name))
        found += [Faster(few(rows), name, TORCH, usual / own)] if taken else []
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

    least = {TORCH: math.inf, "mkl": math.inf}
    for _ in range(1 + ROUNDS):
        for way in least:
            mkl = way != TORCH
            with using(Choice(matmul, cached=mkl)), by_mkl() if mkl else nullcontext():
                least[way] = min(least[way], timed(way, work))
    return [Faster(CACHED, "mkl", TORCH, least[TORCH] / least["mkl"])]


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
