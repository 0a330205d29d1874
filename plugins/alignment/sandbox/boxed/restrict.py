"""Restrict this process for good, before it runs an untrusted program or tests. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
from typing import Any

# linux/mount.h, linux/prctl.h, linux/capability.h
NO_SUID, NO_DEVICES = 1 << 1, 1 << 2
DUMPABLE, NO_NEW_PRIVILEGES, SECCOMP, FILTER = 4, 38, 22, 2
CAPABILITIES = 0x20080522  # version 3
THREAD, NOT_PERMITTED, NO_SUCH_CALL = 0x10000, 1, 38
CLONE3 = 435  # the same on all machines
# System calls that are refused, by machine: new processes and programs, sockets, signals to others, tracing, mounts,
# namespaces, keys, io_uring, bpf, perf, userfaultfd, the memory, files, priorities and processors of others
# (process_madvise, pidfd_getfd, setpriority, sched_setaffinity), and what no limit of memory counts: files that are
# memory (memfd_create, memfd_secret), and shared memory.
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
REFUSED = {
    "x86_64": [
        *(57, 58, 59, 322, 41, 53, 62, 200, 234, 424, 434, 101, 310, 311, 165, 166, 155, 161, 272, 308, 442),
        *(248, 249, 250, 425, 426, 427, 321, 298, 323, 29, 64, 68, 240),
        *(319, 447, 438, 440, 448, *range(428, 434)),
        *(129, 297, 312, 141, 142, 144, 203, 314, 251, 256, 279),
    ],
    "aarch64": [
        *(221, 281, 198, 199, 129, 130, 131, 424, 434, 117, 270, 271, 40, 39, 41, 51, 97, 268, 442),
        *(217, 218, 219, 425, 426, 427, 280, 241, 282, 194, 190, 186, 180),
        *(279, 447, 438, 440, 448, *range(428, 434)),
        *(138, 240, 272, 140, 118, 119, 122, 274, 30, 238, 239),
    ],
}
# Of these calls some arguments are refused: the owner and the kind of a file's signals, the limits of another process.
FCNTL, SIGNALS = {"x86_64": 72, "aarch64": 25}, (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
PRLIMIT = {"x86_64": 302, "aarch64": 261}

libc = ctypes.CDLL(None, use_errno=True)


def restrict(request: dict[str, Any]) -> None:
    """Give this process a folder of its own, no capabilities, limits, and a filter of system calls. It is not dumpable,
    so other processes of the user can read neither its memory nor its open files.

    If the request accepts a ``weaker`` box, it has no folder of its own, and no filter where the system has none.

    Raises:
        OSError: the system does not allow it
    """
    if not request["weaker"]:
        own_folder(request["file_bytes"])
    call("prctl", DUMPABLE, 0, 0, 0, 0)
    call("capset", struct.pack("Ii", CAPABILITIES, 0), bytes(24))
    with contextlib.suppress(OSError, KeyError) if request["weaker"] else contextlib.nullcontext():
        refuse_calls()
    limit(request["seconds"], request["memory"], request["file_bytes"])


def own_folder(file_bytes: int) -> None:
    """Mount an empty /tmp of limited size, for 1,000 files; bubblewrap alone limits neither."""
    settings = f"size={file_bytes},nr_inodes=1000,mode=700"
    call("mount", "box", "/tmp", "tmpfs", NO_SUID | NO_DEVICES, settings)
    os.chdir("/tmp")
    resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))


def call(what: str, *arguments: Any) -> None:
    """Call a function of the C library; by ``syscall`` the first argument is the number.

    Raises:
        OSError: it failed
    """
    given = [a.encode() if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if getattr(libc, what)(*given) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what} {arguments[0]!r}: {os.strerror(number)}")


def limit(seconds: int, memory: int, file_bytes: int) -> None:
    """Limit processor time, memory, the size of a file, and open files."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refuse_calls() -> None:
    """Refuse system calls for the rest of this process: no new process, program, socket, or signal to another."""
    machine = platform.machine()

    def statement(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, k)

    load, equal, above, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow, kill = 0x00050000, 0x7FFF0000, 0x80000000
    program = [statement(load, 4), statement(equal, AUDIT[machine], 1), statement(answer, kill), statement(load, 0)]
    program += [statement(above, 0x40000000, 0, 1), statement(answer, kill)]  # of the x32 interface
    denied = statement(answer, refuse | NOT_PERMITTED)

    def on_argument(number: int, place: int, tests: list[bytes]) -> list[bytes]:
        """Tests of an argument of one call, the first of which is at 0; then its number is loaded again."""
        inside = [statement(load, 16 + 8 * place), *tests, statement(load, 0)]
        return [statement(equal, number, 0, len(inside)), *inside]

    for number in REFUSED[machine]:
        program += [statement(equal, number, 0, 1), denied]
    owners = [each for command in SIGNALS for each in (statement(equal, command, 0, 1), denied)]
    program += on_argument(FCNTL[machine], 1, owners)
    program += on_argument(PRLIMIT[machine], 0, [statement(equal, 0, 1), denied])  # 0: this process
    program += [statement(equal, CLONE3, 0, 1), statement(answer, refuse | NO_SUCH_CALL)]  # threads take the older one
    program += [statement(equal, CLONE[machine], 0, 3), statement(load, 16), statement(bits, THREAD, 1)]
    program += [denied, statement(answer, allow)]
    text = ctypes.create_string_buffer(b"".join(program))
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call("prctl", SECCOMP, FILTER, struct.pack("HxxxxxxQ", len(program), ctypes.addressof(text)), 0, 0)
