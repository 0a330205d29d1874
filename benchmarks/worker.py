"""``python -m benchmarks.worker``: one contender in its own process, controlled over standard input.

Each line in and each line out is a JSON document. The first names a job and its settings; the answer is the job's
description. Every further line is a turn. Between turns the process waits with as little memory as possible. Output of
libraries goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol, TextIO

from benchmarks import settings


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
    kept = settings.keep_memory(order["tuned"], order["device"])
    job: Job = make(**order["arguments"], device=order["device"])
    applied = settings.multiply(order["tuned"], order["device"], kept, job)
    about = {**job.about(), "settings": vars(applied)}
    settings.return_memory()
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
                settings.return_memory()
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")  # libraries print to 1, redirected to 2
    os.dup2(2, 1)
    serve(sys.stdin, own)
