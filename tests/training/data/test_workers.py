"""Loader processes end with the run, and preparing text takes little memory, whatever the size of the file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blockwright.training.data.corpus import TextFiles
from blockwright.training.data.packing import cache_key, pack
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars, Tokenizer

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
from blockwright.training.data.modules.text import Batching
from blockwright.training.data.modules.text import TextDataModule
from blockwright.training.data.corpus import TextFiles
from blockwright.training.data.tokenizers.tokenizer import Bytes

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
def test_loader_processes_and_their_server_end_when_the_run_is_killed(corpus_file, environment, tmp_path):
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


ROOT = Path(__file__).parents[3]
MIB = 2**20
# The peak of a process of its own; tokens are mapped, and not touched.
PROGRAM = """
import sys
from pathlib import Path
from blockwright.training.data.packing import cache_key, pack
from blockwright.training.data.corpus import TextFiles
from blockwright.training.data.tokenizers.rebuild import rebuild

file, kind, vocab_size, separator, cache = sys.argv[1:]
corpus, tokenizer = TextFiles(file, separator or None), rebuild({"kind": kind, "vocab_size": int(vocab_size)})
corpus.check()
pack(corpus, tokenizer, Path(cache), cache_key(corpus.fingerprint(), tokenizer))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def write(file: Path, n_bytes: int) -> Path:
    """Lines of 20,000 different words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzé", k=draw.randint(2, 9))) for _ in range(20_000)]
    ends = ["\n", "\r\n", ".\n", "\n\n"]
    lines = (" ".join(draw.choices(words, k=12)) + draw.choice(ends) for _ in range(10_000))
    block = "".join(lines).encode()
    with file.open("wb") as out:
        while out.tell() < n_bytes:
            out.write(block)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [Bytes(), Chars(64)], ids=lambda t: t.kind)
def test_a_file_is_prepared_in_less_memory_than_it_has_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = TextFiles(str(write(tmp_path / "a.txt", 12 * MIB)))
    tracemalloc.start()
    try:
        pack(corpus, tokenizer, tmp_path, cache_key(corpus.fingerprint(), tokenizer))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * MIB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("kind", "vocab_size", "separator", "megabytes", "most"), [("bytes", 257, "", 100, 32), ("bpe", 1000, "\n", 20, 16)]
)
def test_a_large_file_is_prepared_in_little_more_memory_than_a_small_one(
    tmp_path: Path, environment: dict[str, str], kind: str, vocab_size: int, separator: str, megabytes: int, most: int
) -> None:
    def peak(n_bytes: int) -> int:
        file = write(tmp_path / "a.txt", n_bytes)
        command = [sys.executable, "-c", PROGRAM, str(file), kind, str(vocab_size), separator, str(tmp_path / "cache")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    small, large = peak(10**6), peak(megabytes * 10**6)
    print(f"{kind} {separator!r} {megabytes} MB: {(large - small) / MIB:.1f} MiB over {small / MIB:.0f} MiB")
    assert large - small < most * MIB
