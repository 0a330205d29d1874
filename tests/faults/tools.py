"""Ways to hurt a run: processes that die, disks that are full, bits that turn, machines that go away.

Linux, and for the small disk and the two machines root. Everything is a context manager or a plain function, so that
a test of a new feature takes what it needs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def killed(work: Callable[[], None], after: float, ready: Callable[[], bool] = lambda: True) -> None:
    """Do work in a forked process, which has all imports, and kill it -9 so many seconds after it is ready.

    ``work`` should not end before; a process that has ended is not killed.
    """
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(0)
    patience = time.monotonic() + 60
    while not ready() and time.monotonic() < patience:
        time.sleep(0.001)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def forked(work: Callable[[], int]) -> int:
    """Do work in a forked process of a session of its own, and end whatever it leaves running."""
    process = os.fork()
    if not process:
        os.setsid()
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def small_disk(at: Path, megabytes: int) -> Iterator[Path]:
    """A file system in memory of its own, of so many megabytes. Needs root."""
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Write a file that leaves so many bytes of a file system free."""
    state = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - leave)))
    return ballast


def flip(file: Path, bit: int) -> None:
    """Turn one bit of a file round; again, and it is what it was."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def random_bits(file: Path, n: int, seed: int = 0) -> list[int]:
    """Numbers of ``n`` bits of a file."""
    return [random.Random(seed + i).randrange(8 * file.stat().st_size) for i in range(n)]


@contextlib.contextmanager
def two_machines(prefix: str = "bw") -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a cable, with host names of their own. Needs root."""
    names = [f"{prefix}{i}" for i in (1, 2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "v1", "netns", names[0], "type", "veth", "peer", "name", "v1", "netns", names[1])
        for i, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "v1")
            for device in ("lo", "v1"):
                _ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", _NAMED, name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


# A host name of its own, and a table in which both are found.
_NAMED = (
    'hostname "$0" && hosts=$(mktemp) && for i in 1 2; do echo "10.77.0.$i ${0%?}$i"; done > "$hosts"'
    ' && echo 127.0.0.1 localhost >> "$hosts" && mount --bind "$hosts" /etc/hosts && exec "$@"'
)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Started:
    """A command in a session of its own, whose output is read as it comes.

    Args:
        command: its words
        log: file that its output goes to
    """

    def __init__(self, command: Sequence[str], log: Path, cwd: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for(self, text: str, seconds: float) -> bool:
        """Whether its output holds a text within so many seconds; false when it ends without."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if text in self.log.read_text(errors="replace"):
                return True
            if self.process.poll() is not None:
                return text in self.log.read_text(errors="replace")
            time.sleep(0.05)
        return False

    def end(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
