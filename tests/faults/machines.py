"""Runs over two machines, real but for their cable: ``python tests/faults/machines.py whole|rank|node N``.

Each machine is a network namespace with a host name of its own, and torchrun on each starts one rank. ``whole`` goes
through; in ``rank`` one process of the second machine is killed -9 at step 9; in ``node`` the second machine is gone at
once, torchrun included, and does not come back. Needs root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from campaign import _base  # noqa: E402
from tools import Started, two_machines  # noqa: E402

PATIENCE = 240  # seconds, of a whole run
CALLBACK = '''
import os, signal, time
from pathlib import Path

import lightning as L


class Watched(L.Callback):
    """Writes down when each step was over and what it lost; once, a process or its whole machine dies at a step."""

    observes = "writes down what it sees"

    def __init__(self, folder, die_at=-1, machine=False):
        self.folder, self.die_at, self.machine = Path(folder), die_at, machine

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        died = self.folder / "died"
        if trainer.global_rank != 1 or trainer.global_step != self.die_at or died.exists():
            return
        died.write_text(str(time.time()))
        if self.machine:  # torchrun, this process' parent, first: it must not start another
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_rank == 0:
            told = f"{time.time()} {trainer.world_size} {trainer.global_step} {outputs['loss'].item()}\\n"
            with (self.folder / "steps").open("a") as file:
                file.write(told)
'''


def run(folder: Path, fault: str, steps: int = 14, *overrides: str) -> dict[str, Any]:
    """One run on two machines; what became of it."""
    base = _base(folder)
    (folder / "watched_callback.py").write_text(CALLBACK)
    watched = f"folder: '{folder}', die_at: {-1 if fault == 'whole' else 9}, machine: {str(fault == 'node').lower()}"
    words = [*base, *overrides, "trainer=ddp_sim", "auto_resume=true", f"trainer.max_steps={steps}", "train=true"]
    words += [
        "callbacks.interruption.every_n_steps=2",
        f"+callbacks.watched={{_target_: watched_callback.Watched, {watched}}}",
    ]
    env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "GLOO_SOCKET_IFNAME": "v1", "OMP_NUM_THREADS": "1"}
    # Else the ranks of every attempt share one store, and may call at addresses that the attempt before has left there.
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # A machine that has gone is noticed when it has not been heard of for so long.
    alive = "--rdzv-conf=keep_alive_interval=2,keep_alive_max_attempt=2,last_call_timeout=2"
    with two_machines(f"bw{os.getpid() % 1000}m") as machines:
        running = []
        for i, before in enumerate(machines):
            rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29411", "--rdzv-id=7", alive]
            local = [f"--local-addr=10.77.0.{i + 1}", f"--nnodes={'1:2' if fault == 'node' else 2}"]
            restarts = ["--nproc-per-node=1", "--max-restarts=3"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", *local, *restarts, *rendezvous]
            running.append(
                Started([*before, *torchrun, str(ROOT / "train.py"), *words], folder / f"log{i}", folder, env)
            )
        try:
            codes = _ended(running)
        finally:
            over = time.time()
            for one in running:
                one.end()
    return {"codes": codes, **_figures(folder, over)}


def _ended(running: list[Started]) -> list[int | None]:
    end, codes = time.monotonic() + PATIENCE, []
    for one in running:
        try:
            codes.append(one.process.wait(timeout=max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


def _figures(folder: Path, over: float) -> dict[str, Any]:
    seen = [line.split() for line in (folder / "steps").read_text().splitlines()]
    death = folder / "died"
    after = [float(t) for t, *_ in seen if death.exists() and float(t) > float(death.read_text())]
    losses: dict[int, set[str]] = {}
    for _, world, step, loss in seen:
        losses.setdefault(int(step), set()).add(f"{world}:{loss}")
    recovery = round(after[0] - float(death.read_text()), 1) if after else None
    return {"recovery": recovery, "exit": round(over - float(seen[-1][0]), 1), "steps": losses}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    name, n = sys.argv[1], int((sys.argv[2:] or ["1"])[0])
    for _ in range(n):
        home = Path(tempfile.mkdtemp())
        began = time.monotonic()
        found = run(home, name)
        last = max(found["steps"])
        told = {**found, "steps": last, "seconds": round(time.monotonic() - began, 1)}
        print(name, json.dumps(told), flush=True)
        if found["codes"][0]:
            print((home / "log0").read_text()[-3000:], (home / "log1").read_text()[-2000:], flush=True)
        shutil.rmtree(home, ignore_errors=True)
