"""``python -m benchmarks.worker``: one contender in its own process, controlled over standard input.

Each line in and each line out is a JSON document. The first names a job and its settings; the answer is the job's
description. Every further line is a turn. Between turns the process waits with as little memory as possible. Output of
libraries goes to standard error.

*As it comes* sets nothing. *Best settings* are those of our training, for all contenders: fp32 products in the ways
that are fastest on this CPU at the shapes of the contender (blocks/kernels/timing.py), of which a peer, whose layers
are torch's, has the library; and freed memory kept in the process, set before much is allocated. On a GPU neither
matters: torch keeps memory there anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

USUAL = {(512, 512): 8, (1536, 512): 8, (512, 1536): 4}  # matrices for a job that holds no model


@dataclass(frozen=True)
class Applied:
    """The applied settings, for the record.

    Args:
        kept_memory: whether freed memory stays in the process
        precision: of fp32 products, in torch's terms
        error: relative error of such a product
        measured: each way of computing products against torch's own
    """

    kept_memory: bool
    precision: str
    error: float
    measured: list[str]


def return_memory() -> None:
    """Return freed memory to the system, so that a waiting contender takes no more than it uses."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory(tuned: bool, device: str) -> bool:
    """Keep freed memory in this process, if it has the best settings; whether that was possible."""
    from blockwright.blocks.kernels.machine import keep_freed_memory

    return keep_freed_memory() if tuned and device == "cpu" else False


def multiply(tuned: bool, device: str, kept_memory: bool, job: object) -> Applied:
    """Multiply in this process as is fastest for the models of a job, or as torch does.

    Args:
        tuned: whether this process has the best settings
        device: cpu or cuda
        kept_memory: for the record
        job: which holds models, or what has one as its ``module``
    """
    import torch
    from torch import nn

    from blockwright.blocks.kernels.products import use, used
    from blockwright.blocks.kernels.timing import fastest, matrices

    if tuned and device == "cpu":
        held: list[Any] = [each for value in vars(job).values() for each in (value, getattr(value, "module", None))]
        use(fastest(matrices(*(each for each in held if isinstance(each, nn.Module))) or USUAL))
    found = [str(each) for each in used().found]
    return Applied(kept_memory, torch.get_float32_matmul_precision(), product_error(device), found)


def product_error(device: str) -> float:
    """Relative error of an fp32 product of 512 terms at the current precision, against fp64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = (a.to(device) @ b.to(device)).cpu().double() - exact
    return float(error.norm() / exact.norm())


class Job(Protocol):
    """A worker's job: built from the arguments of the first line."""

    def about(self) -> dict[str, Any]:
        """Its description, for the record."""
        ...

    def turn(self, **arguments: Any) -> dict[str, Any]:
        """Do some work and report it."""
        ...


def reset_peak(device: str = "cpu") -> None:
    """Restart the measurement of peak memory, if the kernel supports it."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str = "cpu") -> int:
    """Peak resident bytes since ``reset_peak``; on a GPU, peak allocated bytes."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux: since the start of the process
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start(order: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """Apply the settings of the first line and build its job."""
    module, _, name = order["job"].partition(":")
    make = getattr(importlib.import_module(module), name)
    import torch

    torch.set_num_threads(order["threads"])
    kept = keep_memory(order["tuned"], order["device"])
    job: Job = make(**order["arguments"], device=order["device"])
    applied = multiply(order["tuned"], order["device"], kept, job)
    about = {**job.about(), "settings": vars(applied)}
    return_memory()
    return job, about


def serve(orders: TextIO, answers: TextIO) -> None:
    """Answer line by line until there are no more."""
    job: Job | None = None
    for line in orders:
        order = json.loads(line)
        try:
            if job is None:
                job, answer = start(order)
            else:
                answer = job.turn(**order)
                return_memory()
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")  # libraries print to 1, redirected to 2
    os.dup2(2, 1)
    serve(sys.stdin, own)
