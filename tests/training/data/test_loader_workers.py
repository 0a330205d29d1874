"""Loader processes: of a server with one thread, and there until the run is over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.data import workers

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pid: int, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while (is_there := Path(f"/proc/{pid}").exists()) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_there


def test_loader_processes_come_of_a_server_with_one_thread_that_no_signal_to_the_run_reaches(make_module: Callable):
    data = make_module(num_workers=2)
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    seen = [next(batches), next(batches)]  # one of each
    pids = [process.pid for process in batches._workers]
    (server,) = {parent_of(pid) for pid in pids}
    assert server != os.getpid() and "Threads:\t1\n" in Path(f"/proc/{server}/status").read_text()
    assert {os.getsid(pid) for pid in [server, *pids]} == {server}

    for pid in [server, *pids]:  # as Slurm sends them
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, signum)
    alone = make_module()
    alone.prepare_data()
    alone.setup("fit")
    seen += list(batches)
    assert len(seen) == 16
    for one, other in zip(seen, alone.train_dataloader(), strict=True):
        assert torch.equal(one["tokens"], other["tokens"])
    assert all(gone(pid) for pid in pids)  # after their grace, though nobody has dismissed them


def test_where_there_is_no_such_server_the_system_says_how_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert workers.forkserver() is None
