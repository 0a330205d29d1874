"""How a command writes its files: every write is noted, and a kill or a full disk can be put before each.

Python reports each open, rename and removal to an audit hook, in this process and in those forked from it. ``WATCHED``
is a program for ``warm`` that runs a command under the hook. A full disk is a limit on the size of files: 0 from a
write on, so that nothing more gets onto the disk, and what a command has truncated stays empty.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

WATCHED = "import sys; sys.path[:0] = {path!r}; import writes; writes.command(**{given!r})"
WRITES = os.O_WRONLY | os.O_RDWR
TEMPORARY = re.compile(r"(?:.*/)?\.(?!hydra(?:/|\Z)).*")  # a path in which a name begins with a dot
WITHOUT_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@dataclass
class Write:
    """Something that was about to happen to a path of the watched folder.

    Args:
        event: ``open``, ``truncate``, ``rename``, ``remove``, ``link`` or ``flush``
        path: within the folder; of a rename the new one
        bytes: in the file at that moment; None without one
        appends: whether a file that is opened keeps what is in it
        source: of a rename, within the folder
        inodes: of the file, or of all files of the folder, that is renamed or flushed
    """

    event: str
    path: str
    bytes: int | None = None
    appends: bool = False
    source: str = ""
    inodes: list[int] = field(default_factory=list)


class Watch:
    """Watches the writes to a folder, of this process and of those that it forks from now on.

    Args:
        folder: watched
        log: file that a line is written to for each write; empty for none
        at: number of the write, from 0, before which the fault comes; −1 for none
        fault: ``kill`` ends all processes of the group, ``full`` fills the disk
        before: file for what the folder holds when the disk is full
    """

    def __init__(self, folder: str, log: str = "", at: int = -1, fault: str = "kill", before: str = "") -> None:
        self.folder, self.at, self.fault, self.before = os.path.realpath(folder), at, fault, before
        self.count = mmap.mmap(-1, 8)  # shared with forks
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if log else None
        self.inside = threading.local()
        self._fsync = os.fsync
        os.fsync = self.fsync  # type: ignore[assignment] # it is not audited
        sys.addaudithook(self.hear)

    def fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if self.log and (path := self.within(os.readlink(f"/proc/self/fd/{number}"))):
            self.note(Write("flush", path, inodes=[os.fstat(number).st_ino]))
        self._fsync(descriptor)

    def within(self, path: Any, folder: int = -1) -> str:
        """A path within the watched folder; empty for others."""
        if not isinstance(path, str | bytes | os.PathLike):
            return ""
        text = os.fsdecode(path)
        if folder >= 0 and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        text = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(text))), os.path.basename(text))
        return text[len(self.folder) + 1 :] if text.startswith(f"{self.folder}/") else ""

    def hear(self, event: str, given: tuple[Any, ...]) -> None:
        if event not in EVENTS or getattr(self.inside, "now", False):
            return
        self.inside.now = True
        try:
            if write := self.written(event, given):
                self.strike()
                self.note(write)
        finally:
            self.inside.now = False

    def written(self, event: str, given: tuple[Any, ...]) -> Write | None:
        """The write that an audit event is; None for a read, and outside of the folder."""
        if event == "open":
            path, mode, flags = given
            if not (flags or 0) & WRITES or not (within := self.within(path)):
                return None
            appends = bool(flags & os.O_APPEND) or (mode is not None and mode.startswith("a"))
            return Write("open", within, self.size(within), appends)
        if event == "os.rename":
            source, path, of, to = given
            if not (within := self.within(path, to)):
                return None
            return Write("rename", within, self.size(within), source=self.within(source, of), inodes=_inodes(source))
        path = given[1] if event in ("os.link", "os.symlink") else given[0]
        of = given[-1] if event in ("os.remove", "os.link") and isinstance(given[-1], int) else -1
        within = self.within(path, of)
        return Write(EVENTS[event], within, self.size(within)) if within else None

    def size(self, within: str) -> int | None:
        try:
            return os.lstat(f"{self.folder}/{within}").st_size
        except OSError:
            return None

    def strike(self) -> None:
        """Count a write, and let the fault come."""
        number = int.from_bytes(self.count[:], "little")
        self.count[:] = (number + 1).to_bytes(8, "little")
        if 0 <= self.at <= number:
            if self.fault == "kill":
                os.killpg(0, signal.SIGKILL)
            if number == self.at:
                Path(self.before).write_bytes(pickle.dumps(contents(Path(self.folder), temporary=True)))
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def note(self, write: Write) -> None:
        if self.log:
            os.write(self.log, (json.dumps(vars(write)) + "\n").encode())


EVENTS = {
    "open": "open", "os.rename": "rename", "os.remove": "remove", "os.truncate": "truncate", "os.link": "link",
    "os.symlink": "link",
}  # fmt: skip


def _inodes(path: Any) -> list[int]:
    if not os.path.isdir(path):
        return [os.stat(path).st_ino] if os.path.exists(path) else []
    return [os.stat(os.path.join(at, name)).st_ino for at, _, names in os.walk(path) for name in names]


def contents(folder: Path, temporary: bool = False) -> dict[str, bytes]:
    """Path within a folder → what a file holds; of those that are temporary only if asked for."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if temporary or not TEMPORARY.fullmatch(name)}


def command(arguments: Sequence[str], **watched: Any) -> None:
    """Be ``python ARGUMENTS``, watched; jobs of a sweep are forked from this process, to be watched, too."""
    _write_through_a_pipe()
    from blockwright.lab.sweep import forking, runner

    runner.Processes = _Forks  # type: ignore[assignment,misc]
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork")  # type: ignore[assignment] # not new interpreters
    Watch(**watched)
    forking.run(arguments)


def _write_through_a_pipe() -> None:
    """What is printed reaches its file from another process: on that one, no limit is set."""
    read, write = os.pipe()
    if not os.fork():
        os.setsid()  # is not killed
        os.close(write)
        while chunk := os.read(read, 1 << 16):
            os.write(1, chunk)
        os._exit(0)
    os.close(read)
    for number in (1, 2):
        os.dup2(write, number)
    os.close(write)


class _Forks:
    """``Processes`` that forks the process that runs the sweep; nothing is printed to a job's log."""

    def __init__(self, *given: Any) -> None:
        pass

    def __enter__(self) -> _Forks:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass

    def start(self, arguments: Sequence[str], log: Any) -> _Fork:
        if pid := os.fork():
            return _Fork(pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        from blockwright.lab.sweep import forking

        forking.end(lambda: forking.run(arguments))


class _Fork:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def read(log: Path) -> list[Write]:
    """The writes that a command noted."""
    return [Write(**json.loads(line)) for line in log.read_text().splitlines()]


def unsafe(writes: Sequence[Write], begun: Mapping[str, str], known: Collection[int] = ()) -> list[str]:
    """What a kill, a full disk or a power failure amid these writes can lose of files that were whole."""
    found: list[str] = []
    flushed, gone = set(known), set()
    for write in writes:
        if write.event == "flush":
            flushed |= set(write.inodes)
        elif TEMPORARY.fullmatch(write.path):
            continue
        elif write.event == "remove":
            gone.add(write.path)
            continue
        elif write.event == "rename" and (left := set(write.inodes) - flushed):
            found.append(f"{write.path}: {len(left)} of {len(write.inodes)} files are renamed before they are flushed")
        elif write.bytes and (write.event == "truncate" or (write.event == "open" and not write.appends)):
            found.append(f"{write.path}: is written over")
        elif write.event == "open" and not write.appends and not any(fnmatch(write.path, own) for own in begun):
            found.append(f"{write.path}: is begun under its own name")
        if write.path in gone:
            found.append(f"{write.path}: is removed before the new one is there")
    return found


def unseen(writes: Sequence[Write], folder: Path) -> list[str]:
    """Files of a folder that no write was noted of: those of a library in C."""
    paths = {write.path for write in writes}
    return [name for name in contents(folder) if not paths & {name, *map(str, Path(name).parents)}]
