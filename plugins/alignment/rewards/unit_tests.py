from __future__ import annotations

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from annotated_types import Ge

from blockwright.plugins.alignment.rewards.rewards import Column, Reward, Rewards, Texts, column
from blockwright.plugins.alignment.sandbox.box import Box, BoxError
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@register("reward", "unit_tests")
class UnitTests(Reward):
    """The share of unit tests that a completion's Python code passes.

    The code is the last fenced block of the completion, or all of it. It runs in a box (sandbox/box.py): a
    process without network, other processes, environment or files of the user, with limits of time and memory, and with
    the standard library only. Tests run in the order given, each by itself, in another box, which the code cannot see:
    they pass if they raise nothing. Code that ends its process passes none of the tests that are left.

    Names that the tests use and do not define are the code's; builtins, and modules of the standard library, are
    Python's own. Tests give functions copies of plain data (numbers, texts, bytes, lists, tuples, sets, dicts), and get
    copies of it; other objects of the code can be called, asked for attributes, items and their length, and iterated,
    but are neither compared nor calculated with. So code can only pass by what it answers; weak tests pass wrong code
    all the same: as for every verifier, read some of what it rewards.

    None where the column holds no test.

    Args:
        tests: name of the column: Python code, or a list of it
        seconds: of processor time for a completion, and as much for its tests; of wall-clock time four times as much
            and 5 more
        memory_mb: of its address space, in MB
        file_mb: of the files that it may write, which nothing else sees, in MB
        workers: completions at once
        weaker: accept a box without bubblewrap, where it is not installed or the system allows no namespaces: code may
            then read and write your files
    """

    bounds = (0.0, 1.0)
    timeout_s = math.inf  # every program has its own

    def __init__(
        self,
        tests: str = "tests",
        seconds: Count = 5,
        memory_mb: Annotated[int, Ge(64)] = 512,
        file_mb: Count = 16,
        workers: Count | None = None,
        weaker: bool = False,
    ) -> None:
        self.tests, self.workers = tests, workers or os.cpu_count() or 1
        self.box = Box(seconds, memory_mb, file_mb, weaker)
        try:
            works = self.box.check()
        except BoxError as error:
            rule = f"the walls that keep programs from your files and network cannot be made ({error})"
            remedy = "Install bubblewrap, and allow user namespaces; or accept less: task.reward.weaker=true"
            raise BlockError("weaker", weaker, rule, remedy) from None
        if not works:
            rule = "Python itself does not run within these limits"
            raise BlockError("memory_mb", memory_mb, rule, "Raise memory_mb and seconds")

    def needs(self) -> tuple[str, ...]:
        return (self.tests,)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        tests = column(columns, self.tests, "unit_tests")
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._judge, completions, tests))

    def _judge(self, completion: str, tests: Any) -> float | None:
        each = [tests] if isinstance(tests, str) else [str(test) for test in tests or ()]
        if not each:
            return None
        try:
            return self.box.passed(code_of(completion), each) / len(each)
        except BoxError:  # no fault of the completion, so a failure, which judging.py counts, and not 0
            return math.nan


def code_of(completion: str) -> str:
    """The last fenced block of a text; all of it without any."""
    return (FENCED.findall(completion) or [completion])[-1]
