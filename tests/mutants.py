"""Changes the source in small ways, and shows which changes no test sees: ``python -m tests.mutants FOLDER``.

A mutant is one change in the body of a function: a comparison or a sign flipped, a number changed, a term dropped, a
refusal or a branch never taken, ``and`` for ``or``. Each runs in a fork, against the tests that reach its line, the
first of each function before its other parameters. A mutant that no test kills is a test to write, or code to delete.
Before tests are deleted, run it with them and without them, with the same ``--seed``.

The tests are collected and measured once, so a mutant costs a few seconds. What runs at import, default values and
decorators are not changed. Needs ``pip install coverage``, and Linux.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import random
import select
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parent.parent
COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
}
CHOSEN = {"min": "max", "max": "min", "any": "all", "all": "any"}


# --- what can be changed ----------------------------------------------------------------------------------------------


def places(tree: ast.AST) -> list[tuple[str, Any]]:
    """(kind of the change, node) for all that can be changed within functions, in a fixed order."""
    found: list[tuple[str, Any]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        for name, value in ast.iter_fields(node):
            of_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name == "args"
            if name in ("annotation", "returns", "decorator_list") or of_definition:
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    if inside:
                        found.extend((kind, child) for kind in _kinds(child))
                    visit(child, inside or isinstance(child, ast.FunctionDef | ast.Lambda))

    visit(tree, False)
    return found


def _kinds(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        yield "compare"
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not _is_text(node.left, node.right):
        yield "compute"
        if isinstance(node.op, ast.Add | ast.Sub):
            yield "drop"
    elif isinstance(node, ast.BoolOp):
        yield "bool"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "unary"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "number"
    elif isinstance(node, ast.If | ast.IfExp):
        refuses = isinstance(node, ast.If) and any(isinstance(line, ast.Raise) for line in node.body)
        yield "refusal" if refuses else "branch"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHOSEN:
        yield "choice"


def _is_text(*nodes: ast.AST) -> bool:
    return any(
        isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str)) for n in nodes
    )


def changed(source: str, place: int) -> ast.Module:
    """The source with one of its places changed."""
    tree = ast.parse(source)
    kind, node = places(tree)[place]
    if kind == "compare":
        node.ops[0] = COMPARED[type(node.ops[0])]()
    elif kind == "compute":
        node.op = COMPUTED[type(node.op)]()
    elif kind == "drop":
        node.right = ast.BinOp(node.right, ast.Mult(), ast.Constant(0))
    elif kind == "bool":
        node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    elif kind == "unary" and isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif kind == "unary":
        node.op = ast.UAdd()
    elif kind == "number":
        node.value = node.value + 1 if type(node.value) is int else node.value * 1.5 or 0.5
    elif kind == "refusal":
        node.test = ast.BoolOp(ast.And(), [node.test, ast.Constant(False)])
    elif kind == "branch":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        node.func.id = CHOSEN[node.func.id]
    for new in ast.walk(node):
        if isinstance(new, ast.expr) and not hasattr(new, "lineno"):
            ast.copy_location(new, node)
    return ast.fix_missing_locations(tree)


def apply(file: Path, place: int) -> int:
    """Give the functions of this process the changed code; returns how many it reached."""
    source, number = file.read_text(), 0
    gc.unfreeze()  # or the search below would not see what conftest.py has frozen
    functions = [o for o in gc.get_objects() if isinstance(o, FunctionType) and _file(o.__code__) == file]
    for name in {f.__code__.co_filename for f in functions}:
        old, new = (_codes(compile(tree, name, "exec")) for tree in (ast.parse(source), changed(source, place)))
        for function in functions:
            key = function.__code__.co_qualname, function.__code__.co_firstlineno
            for was, now in zip(old.get(key, []), new.get(key, []), strict=False):
                if was == function.__code__ != now and was.co_freevars == now.co_freevars:
                    function.__code__ = now
                    number += 1
                    break
    return number


def _file(code: CodeType) -> Path:
    return Path(os.path.realpath(code.co_filename))


def _codes(code: CodeType) -> dict[tuple[str, int], list[CodeType]]:
    found: dict[tuple[str, int], list[CodeType]] = defaultdict(list)
    waiting = [code]
    while waiting:
        each = waiting.pop(0)
        found[each.co_qualname, each.co_firstlineno].append(each)
        waiting += [c for c in each.co_consts if isinstance(c, CodeType)]
    return found


# --- tests in forks ---------------------------------------------------------------------------------------------------


def forked(work: Callable[[Callable[[Any], None]], None], seconds: float) -> tuple[list[Any], bool]:
    """What ``work`` has said in a fork, which is killed after so many seconds; whether it came to its end."""
    here, there = os.pipe()
    if not (child := os.fork()):
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            work(lambda said: os.write(there, (json.dumps(said) + "\n").encode()) and None)
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(there)
    said, end = b"", time.monotonic() + seconds
    while select.select([here], [], [], max(0.0, end - time.monotonic()))[0]:
        if not (part := os.read(here, 1 << 16)):
            break
        said += part
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what its tests have left
    os.close(here)
    done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGKILL) and time.monotonic() < end
    return [json.loads(line) for line in said.splitlines() if line.endswith((b"]", b"}"))], done


def failed(item: pytest.Item, following: pytest.Item | None) -> tuple[bool, bool]:
    """Whether a test fails, and whether it was skipped."""
    reports = runtestprotocol(item, log=False, nextitem=following)
    return any(r.failed for r in reports), any(r.skipped for r in reports)


@dataclass(frozen=True)
class Reached:
    """Of all tests, in their order: CPU-seconds, whether they pass without any change; and the tests of each line."""

    seconds: list[float]
    sound: list[bool]
    lines: dict[str, dict[str, list[int]]]


def reached(items: list[pytest.Item]) -> Reached:
    import coverage

    def work(say: Callable[[Any], None]) -> None:
        tests = ["*/tests/*", "conftest.py"]
        measure = coverage.Coverage(include=[f"{ROOT}/*"], omit=tests, data_file=None)
        seconds, sound = [], []
        measure.start()
        for i, item in enumerate(items):
            measure.switch_context(str(i))
            start = time.process_time()
            bad, skipped = failed(item, items[i + 1] if i + 1 < len(items) else None)
            seconds.append(round(time.process_time() - start, 4))
            sound.append(not bad and not skipped)
        measure.stop()
        data, lines = measure.get_data(), {}
        for file in data.measured_files():
            by_line = data.contexts_by_lineno(file)
            lines[os.path.realpath(file)] = {n: [int(c) for c in found if c] for n, found in by_line.items()}
        say({"seconds": seconds, "sound": sound, "lines": lines})

    said, _ = forked(work, 3600)
    if not said:
        raise SystemExit("the tests ended before they were measured: run them by themselves first")
    return Reached(**said[0])


@dataclass
class Mutants:
    """Plug-in of pytest that runs mutants in place of the tests.

    Args:
        files: whose functions are changed
        number: of mutants, the kinds of changes in turn
        seconds: of the processor, for the tests of one mutant
        again: (file, place) of the mutants to run; None to draw them
    """

    files: list[Path]
    number: int
    seconds: float
    draws: random.Random
    again: list[tuple[str, int]] | None
    write: Callable[[dict[str, Any]], None]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.config.pluginmanager.has_plugin("budget"):  # its hooks need those of whole tests
            session.config.pluginmanager.unregister(name="budget")
        found, stood = reached(session.items), 0
        chosen = self.choose(found)
        for n, (file, place, kind, line) in enumerate(chosen, 1):
            result = self.mutant(session.items, found, file, place)
            if result["functions"] == 0:
                continue  # a function that is made within another one
            stands = not result["killed"] and result["complete"]
            stood += stands
            text = file.read_text().splitlines()[line - 1].strip()
            where = f"{file.relative_to(ROOT)}:{line}"
            self.write({"file": str(file.relative_to(ROOT)), "place": place, "kind": kind, "line": line, **result})
            verdict = "stands" if stands else "killed" if result["killed"] else "unknown"
            print(f"{n}/{len(chosen)} {verdict:7} {where} {kind}: {text}", flush=True)
        print(f"{stood} of {len(chosen)} mutants stand")
        return True

    def choose(self, found: Reached) -> list[tuple[Path, int, str, int]]:
        by_kind: dict[str, list[tuple[Path, int, str, int]]] = defaultdict(list)
        for file in self.files:
            tests = found.lines.get(str(file), {})
            for place, (kind, node) in enumerate(places(ast.parse(file.read_text()))):
                named = self.again is None or (str(file.relative_to(ROOT)), place) in self.again
                if named and tests.get(str(node.lineno)):
                    by_kind[kind].append((file, place, kind, node.lineno))
        for each in by_kind.values():
            self.draws.shuffle(each)
        chosen: list[tuple[Path, int, str, int]] = []
        while any(by_kind.values()) and len(chosen) < self.number:
            chosen += [each.pop() for _, each in sorted(by_kind.items()) if each]
        return chosen[: self.number]

    def mutant(self, items: list[pytest.Item], found: Reached, file: Path, place: int) -> dict[str, Any]:
        line = places(ast.parse(file.read_text()))[place][1].lineno
        tests = self._within(items, found, [t for t in found.lines[str(file)][str(line)] if found.sound[t]])

        def work(say: Callable[[Any], None]) -> None:
            say([apply(file, place)])
            for test, following in zip(tests, [*tests[1:], None], strict=True):
                bad, _ = failed(items[test], None if following is None else items[following])
                say([items[test].nodeid, bad])

        said, _ = forked(work, max(60.0, 12 * sum(found.seconds[t] for t in tests)))
        results = {each[0]: each[1] for each in said[1:]}
        killed = [name for name, bad in results.items() if bad]
        functions = said[0][0] if said else 0
        return {"functions": functions, "ran": len(results), "complete": len(results) == len(tests), "killed": killed}

    def _within(self, items: list[pytest.Item], found: Reached, tests: Iterable[int]) -> list[int]:
        """Of the tests that reach a line, those that the time allows, in their order."""
        first: dict[str, int] = {}
        rest = [t for t in tests if first.setdefault(items[t].nodeid.split("[")[0], t) != t]
        self.draws.shuffle(rest)
        taken: list[int] = []
        for test in [*sorted(first.values(), key=found.seconds.__getitem__), *rest]:
            if not taken or sum(found.seconds[t] for t in taken) + found.seconds[test] <= self.seconds:
                taken.append(test)
        return sorted(taken)


def tests_of(folder: Path) -> list[str]:
    """The tests beside a folder's: ``plugins/NAME/tests``, or the nearest of ``tests/FOLDER``."""
    if folder.parts[0] == "plugins":
        return [str(Path(*folder.parts[:2], "tests"))]
    while not (ROOT / "tests" / folder).is_dir():
        folder = folder.parent
    return [str(Path("tests", folder))]


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("folder", type=Path, help="of source, from the root of the checkout: blocks/gating")
    options.add_argument("--tests", nargs="+", help="files and folders of tests (default: those beside the folder's)")
    options.add_argument("--number", type=int, default=60, help="of mutants (%(default)s)")
    options.add_argument("--seconds", type=float, default=4, help="of the processor for one mutant (%(default)s)")
    options.add_argument("--seed", type=int, default=1, help="of the draw (%(default)s)")
    options.add_argument("--out", type=Path, help="file that takes a line of JSON for each mutant")
    options.add_argument("--again", type=Path, help="such a file: only its mutants that no test killed")
    given, more = options.parse_known_args()
    files = sorted(f.resolve() for f in given.folder.rglob("*.py") if "tests" not in f.parts)
    again = None
    if given.again:
        earlier = map(json.loads, given.again.read_text().splitlines())
        again = [(each["file"], each["place"]) for each in earlier if not each["killed"]]

    def write(result: dict[str, Any]) -> None:
        if given.out:
            with given.out.open("a") as out:
                out.write(json.dumps(result) + "\n")

    mutants = Mutants(files, given.number, given.seconds, random.Random(given.seed), again, write)
    words = ["-p", "no:cacheprovider", "-n", "0", "-s", *(given.tests or tests_of(given.folder)), *more]
    raise SystemExit(pytest.main(words, plugins=[mutants]))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
