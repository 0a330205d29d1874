"""Strategies of several GPUs against one: the same training by torchrun, over NCCL (gloo between CPU processes).

Each training is a process group of its own, killed when its time is up: a collective that waits for ever is what is
looked for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.race import ROOT
from tests.gpu.answer import held, not_applicable
from tests.training.parallel.many_ranks import far

# name → model of many_ranks.py, strategy
CASES: dict[str, tuple[str, dict[str, int] | str]] = {
    "ddp": ("dense", "ddp"), "fsdp": ("dense", {}), "fsdp_ep": ("deepseek", {"expert": 2}),
    "fsdp_tp": ("dense", {"tensor": 2}), "tp_ep": ("moe", {"tensor": 2, "expert": 2}),
    "hsdp": ("dense", {"replicate": 2}), "context": ("dense", {"context": 2}),
}  # fmt: skip
BOUND = 1e-3  # relative, of a loss, and of a weight's norm: fp32 sums in another order, through some steps of AdamW
PATIENCE = 120  # seconds of one training


class Strategies:
    """Job: one strategy a case."""

    def __init__(self, small: bool, device: str) -> None:
        self.device, self.small = device, small
        self.ranks = min(8, torch.cuda.device_count()) if device == "cuda" else 2
        self.right: dict[str, dict[str, Any]] = {}

    def about(self) -> dict[str, Any]:
        return {"cases": list(CASES)}

    def turn(self, case: str) -> dict[str, Any]:
        """Whether losses and weights are those of one process."""
        model, strategy = CASES[case]
        least = 1
        for size in strategy.values() if isinstance(strategy, dict) else ():
            least *= size
        if self.ranks < max(2, least) or self.ranks % least:
            return not_applicable(f"needs more GPUs than {self.ranks}")
        if model not in self.right:
            self.right[model] = self.train("one", model, 1)
        found = self.train(case, model, self.ranks)
        losses, weights = far(found, self.right[model])
        figures = {"ranks": self.ranks, "losses apart": losses, "weights apart": weights, "peak, MB": found["extra"]}
        return held(max(losses, weights) <= BOUND, f"differs by more than {BOUND:.0e}", **figures)

    def train(self, case: str, model: str, ranks: int) -> dict[str, Any]:
        """What ``many_ranks.train`` returns, from processes of torchrun."""
        with tempfile.TemporaryDirectory() as folder:
            file, log = Path(folder) / "found.pt", Path(folder) / "log.txt"
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            given = [case, model, self.device, str(5 if self.small else 20), str(file)]
            with log.open("w") as out:
                process = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", *launcher, "-m", "tests.gpu.rank", *given],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    code = process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    code = f"none within {PATIENCE} s: killed"
                finally:
                    _kill(process.pid)
                    process.wait()
            if code or not file.exists():
                raise RuntimeError(f"{case} on {ranks}: exit code {code}; {_last_error(log.read_text())}")
            return torch.load(file, weights_only=True)


def _kill(leader: int) -> None:
    """End what is left of a process group."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "Error" in line]
    return lines[0][-300:] if lines else log[-300:]
