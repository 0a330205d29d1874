"""Loader processes: of a server with one thread, and there until the run is over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blockwright.training.data import workers

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pid: int, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while (is_there := Path(f"/proc/{pid}").exists()) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_there


@pytest.mark.slow
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
    assert all(gone(pid) for pid in pids)  # after their grace, though no process has dismissed them


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, ROOT)
from blockwright.training.data.modules.corpus import Batching
from blockwright.training.data.modules.text import TextDataModule
from blockwright.training.data.text import TextFiles
from blockwright.training.data.tokenizers.bytes import Bytes

if __name__ == "__main__":
    data = TextDataModule(Batching(Bytes(), 16, 4, corpus=TextFiles(sys.argv[1]), num_workers=2, cache_dir=sys.argv[2]))
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    print(*[process.pid for process in batches._workers], flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_loader_processes_and_their_server_end_when_the_run_is_killed(
    corpus_file: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(KILLED.replace("ROOT", repr(str(Path(__file__).parents[3]))))
    command = [sys.executable, str(program), str(corpus_file), str(tmp_path)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pids = [int(pid) for pid in run.stdout.readline().split()]
    server = parent_of(pids[0])
    assert len(pids) == 2 and server not in (run.pid, 1)
    run.kill()
    run.wait()  # and not for the end of what is written: a process that stays behind could still write
    assert all(gone(pid) for pid in (*pids, server))


def test_where_there_is_no_such_server_the_system_says_how_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert workers.forkserver() is None
