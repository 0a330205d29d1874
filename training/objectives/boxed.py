"""The inside of a box: restrict this process, then run an untrusted program in it. Standard library only.

``box.py`` starts this file as a process of its own, with the request as JSON on stdin. What is written to stdout begins
with the request's ``word``, which the program is not given: ``ok PASSED`` or ``broken REASON``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any

# linux/sched.h, linux/mount.h, linux/prctl.h
NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS, NEW_MOUNTS = (1 << n for n in (28, 29, 30, 27, 26, 17))
PRIVATE, RECURSIVE, BIND, NO_SUID, NO_DEVICES = 1 << 18, 1 << 14, 1 << 12, 1 << 1, 1 << 2
ATTRIBUTES = 1 | 2 | 4  # of mount_setattr: read-only, without set-user-id, without devices
DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
DEATH_SIGNAL, NO_NEW_PRIVILEGES, SECCOMP, FILTER = 1, 38, 22, 2
OUTSIDER, THREAD, NOT_PERMITTED, NO_SUCH_CALL = 65534, 0x10000, 1, 38
MOUNT_SETATTR, CLONE3 = 442, 435  # the same on all machines
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# System calls that are refused, by machine: new processes and programs, sockets, signals to others, tracing, mounts,
# namespaces, keys, io_uring, bpf, perf, userfaultfd, and shared memory that outlives its maker.
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
REFUSED = {
    "x86_64": [
        *(57, 58, 59, 322, 41, 53, 62, 200, 234, 424, 434, 101, 310, 311, 165, 166, 155, 161, 272, 308, 442),
        *(248, 249, 250, 425, 321, 298, 323, 29, 64, 68, 240),
    ],
    "aarch64": [
        *(221, 281, 198, 199, 129, 130, 131, 424, 434, 117, 270, 271, 40, 39, 41, 51, 97, 268, 442),
        *(217, 218, 219, 425, 280, 241, 282, 194, 190, 186, 180),
    ],
}

libc = ctypes.CDLL(None, use_errno=True)


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
    """Limits of processor time, memory, the size of a file, and open files."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def isolate(folder: str, readable: Sequence[str], file_bytes: int) -> None:
    """Continue in a process that has its own users, processes, network and file system.

    Of the files outside it sees Python's own and the system's libraries, and may write to none. It ends when this
    process does.
    """
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_USER | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_MOUNTS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{OUTSIDER} {user} 1"),
        ("gid_map", f"{OUTSIDER} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _continue_in_child()  # the first of the new processes, with which all others end; so it is not the program
    call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _continue_in_child()
    call("mount", "none", "/", None, PRIVATE | RECURSIVE, None)
    call("mount", "box", folder, "tmpfs", NO_SUID | NO_DEVICES, f"size={file_bytes},nr_inodes=1000,mode=755")
    for path in readable:
        _show(path, folder + path)
    for name in ("tmp", ".old"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    call("syscall", PIVOT_ROOT[platform.machine()], folder, f"{folder}/.old")
    os.chdir("/tmp")
    call("umount2", "/.old", DETACH)
    resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("capset", header, none)


def _continue_in_child() -> None:
    """Fork; the parent waits and ends."""
    if child := os.fork():
        os.closerange(0, 64)  # what reads the answer sees its end
        os.waitpid(child, 0)
        os._exit(0)


def _show(path: str, there: str) -> None:
    """Make a folder visible at another place, read-only; a link stays a link."""
    if os.path.islink(path):
        os.makedirs(os.path.dirname(there), exist_ok=True)
        os.symlink(os.readlink(path), there)
        return
    os.makedirs(there, exist_ok=True)
    call("mount", path, there, None, BIND | RECURSIVE, None)
    settings = struct.pack("QQQQ", ATTRIBUTES, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, there, AT_RECURSIVE, settings, len(settings))


def refuse_calls() -> None:
    """Refuse system calls for the rest of this process: no new process, program, socket, or signal to another."""
    machine = platform.machine()

    def statement(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, k)

    load, equal, above, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow, kill = 0x00050000, 0x7FFF0000, 0x80000000
    program = [statement(load, 4), statement(equal, AUDIT[machine], 1), statement(answer, kill), statement(load, 0)]
    program += [statement(above, 0x40000000, 0, 1), statement(answer, kill)]  # of the x32 interface
    for number in REFUSED[machine]:
        program += [statement(equal, number, 0, 1), statement(answer, refuse | NOT_PERMITTED)]
    program += [statement(equal, CLONE3, 0, 1), statement(answer, refuse | NO_SUCH_CALL)]  # threads take the older one
    program += [statement(equal, CLONE[machine], 0, 3), statement(load, 16), statement(bits, THREAD, 1)]
    program += [statement(answer, refuse | NOT_PERMITTED), statement(answer, allow)]
    text = ctypes.create_string_buffer(b"".join(program))
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call("prctl", SECCOMP, FILTER, struct.pack("HxxxxxxQ", len(program), ctypes.addressof(text)), 0, 0)


def restrict(request: dict[str, Any]) -> None:
    """All of the above; only the limits, and what else works, where the request accepts that.

    Raises:
        OSError: the system does not allow it
    """
    if not request["weaker"]:
        isolate(request["folder"], request["readable"], request["file_bytes"])
        refuse_calls()
    else:
        with contextlib.suppress(OSError, AttributeError, KeyError):
            refuse_calls()
    limit(request["seconds"], request["memory"], request["file_bytes"])


def count_passed(program: str, tests: Sequence[str]) -> int:
    """How many tests raise nothing after the program; none if that raises."""
    space: dict[str, Any] = {"__name__": "program"}
    passed = 0
    try:
        exec(compile(program, "program.py", "exec"), space)
    except BaseException:
        return 0
    for test in tests:
        with contextlib.suppress(BaseException):
            exec(compile(test, "test.py", "exec"), space)
            passed += 1
    return passed


def main() -> None:
    request = json.load(sys.stdin)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    word = request.pop("word")
    try:
        restrict(request)
    except (OSError, AttributeError, KeyError, ValueError) as error:
        os.write(report, f"{word} broken {error}".encode())
        os._exit(0)
    passed = count_passed(request["program"], request["tests"])
    os.write(report, f"{word} ok {passed}".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
