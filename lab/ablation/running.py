"""Runs the jobs of a plan, each a process of its own, several at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lab.sweep import record_failure, summarise

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def run_plan(directory: Path, workers: int | None = None) -> int:
    """Run the jobs that have left no results.

    Args:
        directory: with a plan.json
        workers: jobs at a time; None: as the plan says
    """
    plan = json.loads((directory / "plan.json").read_text())
    workers = workers or plan["workers"]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), **os.environ}
    waiting = [job for job in plan["jobs"] if not (directory / str(job["job"]) / "results.json").exists()]
    running: dict[int, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            folder = directory / str(job["job"])
            folder.mkdir(parents=True, exist_ok=True)
            print(f"job {job['job']}: {job['arm']}, seed {job['seed']}", flush=True)
            command = [sys.executable, str(TRAIN), *job["overrides"], f"hydra.run.dir='{folder}'"]
            with (folder / "job.log").open("ab") as log:
                running[job["job"]] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
        for number in [n for n, process in running.items() if process.poll() is not None]:
            if code := running.pop(number).returncode:
                record_failure(directory / str(number), f"exit code {code}: see job.log")
        time.sleep(0.1)
    summarise(directory)
    return 0
