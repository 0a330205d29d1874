"""Code judged by unit tests: what tests may ask of it, and what they get."""

from __future__ import annotations

from typing import Any

import pytest
from boxes import strongest

from blockwright import registry
from blockwright.plugins.alignment.rewards.judging import judge
from blockwright.plugins.alignment.rewards.unit_tests import code_of
from blockwright.plugins.alignment.sandbox.box import Box, BoxError
from blockwright.registry import ConfigError, Node, Scope

pytestmark = pytest.mark.xdist_group("box")  # they look at the processes of the machine


def reward(**settings: Any) -> Any:
    settings = {"weaker": strongest().weaker, **settings}
    return registry.build("reward", Node({"name": "unit_tests", **settings}, "task.reward"), Scope({}, {}))


def test_code_of_a_completion() -> None:
    assert code_of("```\na\n```\nthen\n```py\nb = 1\n```") == "b = 1\n"
    assert code_of("x = 1") == "x = 1" and code_of("```python\nx = 1") == "x = 1"


PROGRAM = """
from collections import Counter, namedtuple
import math
LIMIT = 10
Pair = namedtuple("Pair", "a b")
class Stack:
    kind = "last in, first out"
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    def __repr__(self): return f"Stack{self.items}"
class Mistake(ValueError): pass
def same(x, *more, key=None): return x if key is None else key
def count(word): return Counter(word)
def pair(a, b): return Pair(a, b)
def squares():
    n = 0
    while True: yield n * n; n += 1
def add(a, b): return a + b
def fail(x): raise Mistake(f"not {x}")
def sort(items): items.sort()
def make(x): return lambda y: x + y
"""
PASS = [
    "assert add(2, 3) == 5 and add('a', 'b') == 'ab' and LIMIT == 10",
    "for x in (None, True, 1.5, -7, 10**5000, 'é\\ud800', b'\\xff', 1j, (1, (2,)), [[]], {1, 2}, frozenset('a'), "
    "{(1, 2): [None]}, float('inf')):\n    assert same(x) == x and type(same(x)) is type(x)",
    "assert math.isnan(same(float('nan')))",
    "assert same(1, 2, key='k') == 'k' and pair(1, 2) == (1, 2) and count('aab') == {'a': 2, 'b': 1}",
    "s = Stack(1)\ns.push(2).push([3])\nassert len(s) == 3 and s[1] == 2 and s.pop() == [3] and list(s) == [1, 2]",
    "assert Stack.kind == s.kind and repr(s) == 'Stack[1, 2]' and s and not Stack() and s.push(1) is s",
    "s.items = [7]\nassert s.items == [7]",
    "from itertools import islice\nassert list(islice(squares(), 4)) == [0, 1, 4, 9]",
    "try:\n    fail(3)\nexcept ValueError as error:\n    assert str(error) == 'not 3'\nelse:\n    assert False",
    "def check(candidate):\n    assert candidate(1, 1) == 2\ncheck(add)",
    "assert make(1)(2) == 3",
    "import re\nassert re.sub('a', 'b', same('aa')) == 'bb'",
    "helper = lambda: add(1, 1)",
    "assert helper() == 2",
]
FAIL = [
    "assert add(2, 2) == 5",
    "assert missing(1)",
    "items = [2, 1]\nsort(items)\nassert items == [1, 2]",  # it was given a copy
    "assert Stack(1) == Stack(1)",
    "assert same(print)",
    "assert fail(1) is None",
    "assert add(1,",
    "raise SystemExit(0)",
    "try:\n    same('x' * 10**7)\nexcept ValueError:\n    pass",
]


@pytest.mark.slow
def test_what_tests_may_ask_of_code() -> None:
    tests = [test for both in zip(PASS, [*FAIL, *FAIL], strict=False) for test in both]
    assert strongest().passed(PROGRAM, tests) == len(PASS)
    assert strongest().passed(PROGRAM, FAIL) == 0


def test_share_of_tests_that_pass_counts_also_where_the_code_ends() -> None:
    ends = "Here:\n```python\nimport os\ndef f(x):\n    return x if x < 3 else os._exit(0)\n```\nDone."
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3", "assert f(1) == 1"]
    codes = [ends, "def f(x): return 1", "no code", ends, ends]
    assert reward()([""] * 5, codes, tests=[tests, tests, tests, [], "1/0"]) == [0.5, 0.5, 0.0, None, 0.0]


def test_ended_code_is_no_exception_that_a_test_expects() -> None:
    tests = [f"try:\n    f(-1)\nexcept {kind}:\n    pass" for kind in ("Exception", "BaseException")]
    assert strongest().passed("import os\ndef f(x): os._exit(0)", tests) == 0


def test_box_that_does_not_start_is_a_failure_of_one_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    made = reward()

    def passed(self: Box, source: str, tests: Any) -> int:
        if source == "b":
            raise BoxError("a process in a box did not start")
        return 1

    monkeypatch.setattr(Box, "passed", passed)
    with pytest.warns(UserWarning, match="1 of 3 completions"):
        found, failed = judge(made, [""] * 3, ["a", "b", "c"], {"tests": ["1"] * 3})
    assert failed == [0, 1, 0] and found["unit_tests"][::2] == [1.0, 1.0]


def test_system_without_walls_is_refused_unless_accepted_and_so_are_limits_too_low(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(self: Box) -> bool:
        if not self.weaker:
            raise BoxError("bwrap: No permissions to create new namespace")
        return True

    monkeypatch.setattr(Box, "check", without)
    for key, settings in (("weaker", {"weaker": False}), ("memory_mb", {"memory_mb": 1})):
        with pytest.raises(ConfigError) as refusal:
            reward(**settings)
        assert refusal.value.path == f"task.reward.{key}"
    assert reward(weaker=True)([""], ["x = 1"], tests=["assert x == 1"]) == [1.0]
