"""Runs checks in processes of their own, each with one pretended GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.absent_gpu import shim

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A process that checks what it is asked to on one GPU, and takes a fault of one case for no reason to stop."""

    def __init__(self, gpu: str, folder: Path) -> None:
        """
        Args:
            gpu: of ``device.GPUS``
            folder: for the shim, which workers share, and for what they compile, which they do not
        """
        library, own = shim.build(folder), Path(tempfile.mkdtemp(prefix=gpu, dir=folder))
        caches = {"TRITON_CACHE_DIR": str(own / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor")}
        self.errors = own / "errors.txt"
        self._stderr = self.errors.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.absent_gpu.worker", str(library), gpu],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=ROOT,
            env={**os.environ, **caches, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def ask(self, check: str, of: str) -> dict[str, Any]:
        """The answer to one case: its ``fault`` or None, ``seconds`` of a processor, figures."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"check": check, "of": of}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended at {check} {of}:\n{self.errors.read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._stderr.close()


@contextmanager
def worker(gpu: str, folder: Path) -> Iterator[Worker]:
    """A worker, until the block ends."""
    made = Worker(gpu, folder)
    try:
        yield made
    finally:
        made.close()


def asked(gpu: str, folder: Path, check: str, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and answer of each case of one check."""
    with worker(gpu, folder) as one:
        for name in names:
            yield name, one.ask(check, name)
