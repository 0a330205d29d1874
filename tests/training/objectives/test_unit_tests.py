"""Programs in a box: what they pass, and that hostile ones do nothing but fail."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import registry
from registry import ConfigError, Node, Scope
from training.objectives import box as module
from training.objectives.box import Box, BoxError
from training.objectives.reward.unit_tests import code_of

BOX = Box(seconds=1, memory_mb=256, file_mb=2)


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    try:
        BOX.passed("", ["1"])
    except BoxError as error:
        pytest.skip(f"no namespaces here: {error}")


def reward(**settings: Any) -> Any:
    return registry.build("reward", Node({"name": "unit_tests", **settings}, "task.reward"), Scope({}, {}))


def test_share_of_tests_that_pass() -> None:
    good = "Here:\n```python\nimport math\ndef f(x):\n    return math.floor(x)\n```\nDone."
    tests = ["assert f(1.5) == 1", "assert f(-1.5) == -2"]
    found = reward()(
        [""] * 5, [good, "def f(x): return 1", "no code", good, good], tests=[tests, tests, tests, [], "1/0"]
    )
    assert found == [1.0, 0.5, 0.0, None, 0.0]


def test_code_of_a_completion() -> None:
    assert code_of("```\na\n```\nthen\n```py\nb = 1\n```") == "b = 1\n"
    assert code_of("x = 1") == "x = 1" and code_of("```python\nx = 1") == "x = 1"


OPENS = (
    "import os\ndef can(act, *args, **kw):\n    try:\n        act(*args, **kw)\n    except (OSError, RuntimeError):\n"
)
OPENS += "        return False\n    return True\n"

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
    "old root": "assert os.listdir('/.old')",
    "large file": "open('/tmp/x', 'wb').write(bytes(10**7))",
    "many files": "for i in range(5000): open(f'/tmp/{i}', 'w').close()",
    "memory": "bytearray(10**9)",
    "threads": "from threading import Thread; import time\n"
    "for i in range(500): Thread(target=time.sleep, args=(1,), daemon=True).start()",
    "early end": "os._exit(0)",
    "exception": "raise SystemExit(0)",
    "crash": "import ctypes; ctypes.string_at(0)",
    "forged count": "[os.write(fd, b'ok 1') for fd in range(3, 64) if can(os.write, fd, b'')]; os._exit(0)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_can_do_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these tests passes if the program does what it must not."""
    monkeypatch.setenv("SECRET", "123456")
    users = tmp_path / "theirs.txt"
    users.write_text("mine")
    assert BOX.passed(f"USERS = {str(users)!r}\n{OPENS}", [HOSTILE[name]]) == 0
    assert users.read_text() == "mine" and os.listdir(tmp_path) == ["theirs.txt"]


def test_what_the_hostile_programs_use_works_where_it_may() -> None:
    """So that they fail for the right reason."""
    harmless = ["assert can(open, '/tmp/x', 'w')", "assert can(open, os.__file__)", "import ctypes, socket, subprocess"]
    harmless += ["import threading; t = threading.Thread(target=int); t.start(); t.join()", "bytearray(10**7)"]
    assert BOX.passed(OPENS, harmless) == len(harmless)


def test_program_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its processor time; one that only waits, and has left its group, by the clock."""
    assert BOX.passed("while True: pass", ["1"]) == 0
    monkeypatch.setattr(module, "START_S", -2.0)
    before = time.monotonic()
    leaves = "import ctypes, os, time\nos.setsid()\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(600)"
    assert BOX.passed(leaves, ["1"]) == 0 and time.monotonic() - before < 60
    time.sleep(0.2)
    assert not [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _is_boxed(pid)]


def _is_boxed(pid: str) -> bool:
    try:
        return "boxed.py" in Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return False


def test_flood_of_output_is_not_kept() -> None:
    flood = "import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 10**6)\n"
    flood += "    except OSError: pass"
    assert BOX.passed("print('x' * 10**6)", ["1"]) == 1
    assert BOX.passed(flood, ["1"]) == 0


def test_system_without_namespaces_is_refused_unless_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(self: Box, program: str, tests: Any) -> int:
        if not self.weaker:
            raise BoxError("unshare 268435456: Operation not permitted")
        return len(tests)

    monkeypatch.setattr(Box, "passed", without)
    with pytest.raises(ConfigError, match="unshare 268435456: Operation not permitted") as refusal:
        reward()
    assert refusal.value.path == "task.reward.weaker" and "task.reward.weaker=true" in refusal.value.remedy
    assert reward(weaker=True)([""], ["x"], tests=["1"]) == [1.0]


def test_weaker_box_still_has_limits_and_no_processes_or_network() -> None:
    weak = Box(seconds=1, memory_mb=256, file_mb=2, weaker=True)
    tests = ["1", HOSTILE["fork"], HOSTILE["socket"], HOSTILE["kill"], HOSTILE["memory"], HOSTILE["environment"]]
    assert weak.passed(OPENS, tests) == 1


def test_limits_too_low_for_python_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 64"):
        reward(memory_mb=1)


def test_box_works_outside_the_main_thread() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(BOX.passed("", ["1"])))
    thread.start()
    thread.join()
    assert found == [1]
