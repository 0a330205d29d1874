"""Jobs that workers of tests do."""

from __future__ import annotations

import os
from typing import Any


class Toy:
    """Says who it is and how often it was asked, prints as libraries do, and fails when told to."""

    def __init__(self, fails_at: int, megabytes: int, device: str) -> None:
        self.fails_at, self.count, self.held = fails_at, 0, bytearray(os.urandom(1)) * (megabytes << 20)

    def about(self) -> dict[str, Any]:
        print("a library has something to say")
        return {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}

    def turn(self, **arguments: Any) -> dict[str, Any]:
        from benchmarks.worker import peak_memory

        self.count += 1
        os.write(1, b"a library writes to the standard output\n")
        if self.count == self.fails_at:
            raise RuntimeError("told to")
        return {"count": self.count, "arguments": arguments, "peak_bytes": peak_memory()}
