"""Programs that try to pass their tests without being right: each gets 0, and its neighbours what they deserve."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import pytest
from boxes import strongest

from blockwright import registry
from blockwright.plugins.alignment.rewards.judging import judge
from blockwright.registry import Node, Scope

pytestmark = pytest.mark.xdist_group("box")  # they look at the processes of the machine

TESTS = [
    "assert f(3) == 9",
    "assert all(f(x) == x * x for x in range(1, 5))",
    "assert math.isclose(f(0.5), 0.25)",
    "assert abs(f(1.5) - 2.25) < 1e-9 and isinstance(f(1), int)",
    "assert f(2) in (4, 4.0) and not f(2) != 4",
]
HONEST = {"def f(x): return x * x": 1.0, "def f(x): return 9": 0.2, "def f(x): return x": 0.0, "def f(x: return 9": 0.0}

# Where a program finds the text of a test, it works out what to say.
SEARCH = """
import re
def say(texts, x):
    for text in texts:
        for test in text if isinstance(text, (list, tuple)) else [text]:
            if isinstance(test, str) and "".join(("assert", " f(3)")) in test:
                return 9 if x == 3 else x * x
    return "nothing"
"""
FORGED = {
    "frames": SEARCH
    + """
import sys
def f(x):
    frame, found = sys._getframe(), []
    while frame:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        for value in list(found):
            found += value.values() if isinstance(value, dict) else []
        frame = frame.f_back
    return say(found, x)
""",
    "frames at the start": """
import sys
frame = sys._getframe()
while frame:
    for name in ("passed", "report", "request", "tests", "verdict", "word"):
        if name in frame.f_locals:
            frame.f_locals[name] = 10**9
    frame = frame.f_back
""",
    "collector": SEARCH
    + """
import gc
def f(x):
    return say([text for kept in gc.get_objects() for text in (kept.values() if isinstance(kept, dict) else
        kept if isinstance(kept, (list, tuple)) else [])], x)
""",
    "standard input": SEARCH + "import sys\ndef f(x): return say([sys.stdin.read()], x)",
    "equal to all": """
class All:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __sub__(self, other): return 0
    __rsub__ = __abs__ = __float__ = __hash__ = lambda self, *_: 0
    __class__ = int
def f(x): return All()
""",
    "numbers equal to all": """
class Number(float):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0
def f(x): return Number(0)
""",
    "lists equal to all": """
class List(list):
    def __eq__(self, other): return True
def f(x): return List()
""",
    "builtins": """
import builtins
builtins.all = builtins.isinstance = lambda *_: True
builtins.abs = lambda *_: 0
builtins.compile = builtins.exec = lambda *_: None
builtins.AssertionError = type("Never", (Exception,), {"__new__": lambda *_: None})
builtins.__build_class__ = None
def f(x): return 0
""",
    "names of builtins": """
all = isinstance = lambda *_: True
abs = lambda *_: 0
class math: isclose = lambda *_: True
AssertionError = Exception
def f(x): return 0
""",
    "modules": """
import ast, math, sys, types
math.isclose = lambda *_: True
sys.modules["math"] = types.SimpleNamespace(isclose=lambda *_: True)
def f(x): return 0
""",
    "its side of the pipe": """
import sys
inside = sys.modules["blockwright.plugins.alignment.sandbox.boxed.program"]
inside.packed = lambda value, number: True
inside.send = lambda sink, message: (sink.write(b'{"value": true, "passed": 5}\\n'), sink.flush())
def f(x): return True
""",
    "prepared answers": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"value": {"object": 0}}\\n{"value": true}\\n' * 50)
    except OSError: pass
def f(x): return True
""",
    "prepared verdicts": """
import os
for fd in range(64):
    for word in (b"r11111", b"1" * 64, b"ok 5", b"ok 1000000000", b"ok " + b"9" * 400, b"broken boo", b"x", b"ok x"):
        try: os.write(fd, word)
        except OSError: pass
os._exit(0)
""",
    "verdicts at exit": """
import atexit, os
def write():
    for fd in range(64):
        try: os.write(fd, b"r11111\\n")
        except OSError: pass
atexit.register(write)
def f(x): raise SystemExit(0)
""",
    "early end": "import os\nos._exit(0)",
    "end in a call": "import os\ndef f(x): os._exit(0)",
    "exit": "raise SystemExit(0)",
    "closed descriptors": "import os\nos.closerange(0, 64)\ndef f(x): return x * x",
    "descriptors closed in a call": "import os\ndef f(x): os.closerange(0, 64); return x * x",
    "malformed answers": """
import itertools, os, sys
inside = sys.modules["blockwright.plugins.alignment.sandbox.boxed.program"]
words = itertools.cycle([
    b"[]", b"null", b'{"value": {"int": "z"}}', b'{"value": {"list": 3}}', b'{"raised": 1}', b"\\xff", b"9" * 5000,
    b'{"value": [1]}', b'{"value": {"object": [1]}}', b'{"value": {}}', b'{"value": ' + b"[" * 10**5])
inside.send = lambda sink, message: (sink.write(next(words) + b"\\n"), sink.flush())
def f(x): return x * x
""",
    "not a number": "def f(x): return float('nan')",
    "infinite": "def f(x): return float('inf')",
    "huge": "def f(x): print(10**400); return 10**400000",
    "printed": "def f(x): print(x * x)\nprint(10**400, 'ok 5', 'broken boo')",
    "deep": "def f(x):\n    found = []\n    for _ in range(10**5): found = [found]\n    return found",
    "itself": "def f(x):\n    found = []\n    found.append(found)\n    return found",
    "long": "def f(x): return 'x' * 10**7",
    "many": "def f(x): return list(range(3 * 10**5))",
    "flood": """
import os
for fd in range(3, 64):
    try:
        while True: os.write(fd, b"x" * 10**6)
    except OSError: pass
""",
    "exceptions": """
class Odd(AssertionError, KeyboardInterrupt):
    def __str__(self): raise SystemExit(0)
class Meta(type):
    @property
    def __mro__(cls): raise MemoryError
def f(x): raise Odd()
""",
    "end of an iteration": "def f(x): raise StopIteration",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "no end": "def f(x):\n    while True: pass",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "memory": "kept = []\ndef f(x):\n    while True: kept.append(bytearray(10**7))",
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "its own memory": """
import ctypes
def f(x):
    ctypes.memset(id(9) + 24, 1, 1)
    return 0
""",
    "fork": "import os\nwhile True: os.fork()",
    "signals": "import os\nfor pid in (os.getppid(), 1, 2, -1, 0): os.kill(pid, 9)",
    "memory of the judge": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in range(1, 400):
    if pid != os.getpid() and libc.ptrace(16, pid, 0, 0) == 0:
        os._exit(3)
def f(x): return 0
""",
    "memory files": """
import os
for _ in range(50): os.write(os.memfd_create("x"), bytes(10**6))
def f(x): return x * x
""",
}


# Of the others, most take all of the seconds or of the memory that a box has.
QUICK = ("frames", "equal to all", "its side of the pipe", "prepared verdicts")


def rewarded(names: Iterable[str]) -> dict[str, float]:
    """The rewards of some of them, in one rollout, with an honest program behind every fourth."""
    limits = {"seconds": 1, "memory_mb": 128, "file_mb": 1}
    node = {"name": "unit_tests", **limits, "weaker": strongest(**limits).weaker}
    reward = registry.build("reward", Node(node, "task.reward"), Scope({}, {}))
    programs: dict[str, str] = {}
    for i, name in enumerate(names):
        programs[name] = textwrap.dedent(FORGED[name])
        programs |= {f"honest after {name}": "def f(x): return x * x"} if i % 4 == 0 else {}
    programs |= {text: text for text in HONEST}
    columns = {"tests": [TESTS] * len(programs)}
    found, failed = judge(reward, [""] * len(programs), list(programs.values()), columns)
    assert not any(failed)
    return dict(zip(programs, found["unit_tests"], strict=True))


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(FORGED), marks=pytest.mark.slow)], ids=["some", "all"])
def test_forged_verdict_is_worth_nothing_and_its_neighbours_keep_their_rewards(names: Sequence[str]) -> None:
    found = rewarded(names)
    assert {name: found[name] for name in names if found[name] != 0} == {}
    honest = {name: value for name, value in found.items() if name not in FORGED}
    assert len(honest) >= len(HONEST) + len(names) // 4
    assert honest == {name: HONEST.get(name, 1.0) for name in honest}
