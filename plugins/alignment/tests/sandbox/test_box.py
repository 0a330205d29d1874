"""What a program in a box cannot do to the machine, and how a box ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from boxes import strongest

from blockwright.plugins.alignment.sandbox import box as module
from blockwright.plugins.alignment.sandbox.box import Box, BoxError

pytestmark = pytest.mark.xdist_group("box")  # they look at the processes of the machine

BOX, WEAK = (Box(seconds=1, memory_mb=256, file_mb=2, weaker=weaker) for weaker in (False, True))


@pytest.fixture(scope="module")
def walls() -> None:
    if strongest().weaker:
        pytest.skip("bubblewrap is not here, or not allowed to work")


OPENS = """
import os
def can(act, *args, **kw):
    try: act(*args, **kw)
    except (OSError, RuntimeError): return False
    return True
"""
BOXED = "blockwright.plugins.alignment.sandbox.boxed.program"
HOSTILE = {
    "fork": "assert can(os.fork)",
    "program": "import subprocess; assert can(subprocess.run, ['/bin/true'])",
    "exec": "assert can(os.execv, '/bin/true', ['true'])",
    "socket": "import socket; assert can(socket.socket)",
    "unix socket": "import socket; assert can(socket.socketpair)",
    "kill": "assert can(os.kill, os.getppid(), 9)",
    "kill all": "assert can(os.kill, -1, 9)",
    "environment": "assert 'SECRET' in os.environ or len(os.environ) > 2",
    "environment of others": "assert os.path.exists('/proc/self')",
    "password file": "assert can(open, '/etc/passwd')",
    "file of the user": "assert can(open, USERS)",
    "writing there": "assert can(open, USERS, 'w')",
    "writing beside": "os.makedirs(os.path.dirname(USERS)); open(USERS, 'w').close(); assert os.path.exists('/etc')",
    "system": "assert can(open, '/usr/x', 'w')",
    "Python": "assert can(open, os.__file__, 'a')",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "namespace": "import ctypes; assert ctypes.CDLL(None).unshare(1 << 28) == 0",
    "root": "assert can(open, '/x', 'w')",
    "our files": f"import sys; assert can(open, sys.modules[{BOXED!r}].__file__, 'a')",
    "limits": "import resource; assert can(resource.setrlimit, resource.RLIMIT_AS, (10**12, 10**12))",
    "large file": "open('/tmp/x', 'wb').write(bytes(10**7))",
    "many files": "for i in range(5000): open(f'/tmp/{i}', 'w').close()",
    "memory": "bytearray(10**9)",
    "threads": "from threading import Thread; import time\n"
    "for i in range(500): Thread(target=time.sleep, args=(1,), daemon=True).start()",
    "memory file": "assert can(os.memfd_create, 'x')",
    "trace": "import ctypes; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "process file": "assert can(os.pidfd_open, os.getpid())",
    "queued signal": "import ctypes; info = bytes(8) + b'\\xff' * 4 + bytes(116)\n"
    "assert ctypes.CDLL(None).syscall(129, os.getppid(), 0, info) == 0",
    "owner of signals": "import fcntl; assert can(fcntl.fcntl, os.pipe()[0], 8, os.getppid())",
    "kind of signals": "import fcntl; assert can(fcntl.fcntl, os.pipe()[0], 10, 9)",
    "limits of others": "import resource; assert can(resource.prlimit, os.getppid(), resource.RLIMIT_CORE)",
    "priority of others": "assert can(os.setpriority, os.PRIO_PROCESS, os.getppid(), 19)",
    "keys of the kernel": "import ctypes; assert ctypes.CDLL(None).syscall(250, 0, -3, 0) >= 0",
}


def attempt(what: str) -> str:
    """A program whose ``attempt()`` does something."""
    return f"{OPENS}def attempt():\n{textwrap.indent(what, '    ')}\n    return True\n"


DONE = ["assert attempt()"]


@pytest.mark.usefixtures("walls")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_can_do_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of each passes if the program does what it must not."""
    monkeypatch.setenv("SECRET", "123456")
    users = tmp_path / "theirs.txt"
    users.write_text("mine")
    assert BOX.passed(f"USERS = {str(users)!r}\n{attempt(HOSTILE[name])}", DONE) == 0
    assert users.read_text() == "mine" and os.listdir(tmp_path) == ["theirs.txt"]


@pytest.mark.usefixtures("walls")
def test_what_the_hostile_programs_use_works_where_it_may() -> None:
    """So that they fail for the right reason."""
    harmless = "assert can(open, '/tmp/x', 'w'); assert can(open, os.__file__); import ctypes, socket, subprocess\n"
    harmless += f"import sys; assert can(open, sys.modules[{BOXED!r}].__file__)\n"
    harmless += "import threading; t = threading.Thread(target=int); t.start(); t.join(); bytearray(10**7)"
    assert BOX.passed(attempt(harmless), DONE) == 1


@pytest.mark.usefixtures("walls")
def test_program_that_waits_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that has left its group, and does not end with its parent; what it passed before counts."""
    monkeypatch.setattr(module, "START_S", 1.0)
    monkeypatch.setattr(module, "PATIENCE", 1)
    before = time.monotonic()
    leaves = (
        "import ctypes, os, time\ndef f(x): return x\ndef leave():\n    try: os.setsid()\n    except OSError: pass\n"
    )
    leaves += "    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n    time.sleep(600)"
    assert BOX.passed(leaves, ["assert f(1) == 1", "leave()", "assert f(1) == 1"]) == 1
    while left := [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _ours(pid)]:
        assert time.monotonic() - before < 60, left  # one that is killed may be seen for a moment
        time.sleep(0.05)
    assert time.monotonic() - before < 60


def _ours(pid: str) -> bool:
    """Whether a process is of a box of this one, which is one of its descendants or has lost its parent."""
    try:
        command, parent = Path("/proc", pid, "cmdline").read_bytes(), Path("/proc", pid, "stat").read_text()
    except OSError:
        return False
    return b"boxed" in command and int(parent.rpartition(")")[2].split()[1]) in (1, os.getpid())


def test_box_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the judge, of the program alone, or of bubblewrap: an error, which has the system's reason, and not 0."""
    python = module._python
    for broken in ("judge", "program"):
        false = lambda role, root, broken=broken: ["false"] if role.__name__.endswith(broken) else python(role, root)  # noqa: E731
        monkeypatch.setattr(module, "_python", false)
        with pytest.raises(BoxError):
            WEAK.passed("def f(x): return x", ["assert f(1) == 1"])
    monkeypatch.setattr(module, "_bubblewrap", lambda: None)
    with pytest.raises(BoxError):
        BOX.check()
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(module, "_bubblewrap", lambda: str(refusing))
    with pytest.raises(BoxError, match=r"^bwrap: No permissions to create new namespace$"):
        BOX.check()


SOME = ("fork", "socket", "memory", "trace")
OTHERS = ("environment", "queued signal", "limits of others", "kill", "memory file", "owner of signals")
OTHERS += ("kind of signals", "priority of others")


@pytest.mark.parametrize("names", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_weaker_box_still_has_limits_and_no_processes_or_network(names: tuple[str, ...]) -> None:
    assert [name for name in names if WEAK.passed(attempt(HOSTILE[name]), DONE)] == []


def test_weaker_box_hides_the_judge() -> None:
    """Its memory, and the pipe of its verdict, from a program of the same user that sees it in /proc. Its own judge has
    begun; another box's may be about to begin, and is not hidden yet."""
    look = """
def is_own_judge(pid):
    try: command, status = (open(f'/proc/{pid}/{what}', 'rb').read() for what in ('cmdline', 'status'))
    except OSError: return False
    return b'boxed.judge' in command and b'PPid:\\t%d\\n' % os.getppid() in status
found = []
for pid in filter(str.isdigit, os.listdir('/proc')):
    if is_own_judge(pid):
        found += [can(open, f'/proc/{pid}/{what}', 'r+b') for what in ('mem', 'fd/1')]
"""
    program = attempt(f"{look}assert any(found)")
    assert WEAK.passed(program, DONE) == 0
    assert WEAK.passed(attempt(f"{look}assert found"), DONE) == 1  # it does see the judge


FORGING = """
import os
opened = []
for fd in os.listdir(f'/proc/{os.getppid()}/fd'):
    try:
        opened.append(os.open(f'/proc/{os.getppid()}/fd/{fd}', os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        pass
open({file!r}, 'w').write(str(len(opened)))  # before this process is ended, which is as soon as enough has come
for fd in opened:
    try:
        os.write(fd, b'1' * 4096)
    except OSError:
        pass
def f(x): return 0
"""
TRAINER = """
import struct
from blockwright.plugins.alignment.sandbox.box import Box
from blockwright.plugins.alignment.sandbox.boxed.restrict import CAPABILITIES, call
call("capset", struct.pack("Ii", CAPABILITIES, 0), bytes(24))  # an ordinary user's process, whatever runs the tests
box = Box(seconds=1, memory_mb=256, file_mb=2, weaker=True)
print(box.passed({program!r}, ["assert f(1)"] * 3))
"""


def test_weaker_box_takes_no_verdict_from_the_trainers_end_of_the_pipe(tmp_path: Path) -> None:
    file = tmp_path / "tried"
    program = FORGING.replace("{file!r}", repr(str(file)))
    command = [sys.executable, "-c", TRAINER.format(program=program)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=module.ROOT, check=False)
    assert found.stdout.lstrip("1") == "0\n", found.stderr  # the program writes to this stdout too
    assert int(file.read_text()) > 1  # it did reach more than the file of this count


def test_box_works_outside_the_main_thread() -> None:
    found: list[int] = []
    box = strongest()
    thread = threading.Thread(target=lambda: found.append(box.passed("def f(): return 1", ["assert f() == 1"])))
    thread.start()
    thread.join()
    assert found == [1]
