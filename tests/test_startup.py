"""Help, the catalogue and refusals must not wait for the import of Lightning."""

from __future__ import annotations

import functools
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from quickest import quickest

from blockwright.commands import offers

pytestmark = pytest.mark.xdist_group("startup")  # its fixture runs a whole program, once

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 3.0  # CPU-seconds, of which torch alone is one and a half
TORCH = 1.5

COMMANDS = {
    "help": (["train.py", "--help"], 0),
    "catalogue": (["-m", "blockwright.registry"], 0),
    "refusal": (["train.py", "model.attention.n_heads=7"], 64),
    "refusal by Hydra": (["train.py", "model/attention=mlaa"], 64),
}


SLOW = {"lightning", "pytorch_lightning", "torchmetrics", "torch._dynamo", "matplotlib", "tensorboard", "sympy"}
WITHOUT_TORCH = ("blocks", "report", "sweep")

# The help of every command, each in a fork of a process that has torch already, if the command needs it.
HELP = """
import contextlib, io, json, os, sys, time, traceback
from blockwright.command import run

def answer(name):
    said, code, start = io.StringIO(), None, time.process_time()
    sys.argv = ["blockwright", name, "--help"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = run([name, "--help"]) or 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
    print(json.dumps([name, code, said.getvalue(), time.process_time() - start, sorted(sys.modules)]), flush=True)
    os._exit(0)

for names in json.loads(sys.argv[1]):
    for name in names:
        if not os.fork():
            answer(name)
        os.wait()
    import torch
"""


@dataclass
class Answer:
    """What a command did. ``seconds`` are of CPU time, whatever else the machine does."""

    code: int
    out: str
    err: str
    imported: set[str]
    seconds: float
    folder: Path


def measured(command: list[str], environment: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a command answered, and its CPU-seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def answer(name: str, environment: dict[str, str], folder: Path, *watched: str) -> Answer:
    arguments, code = COMMANDS[name]
    out_of_the_way = [f"hydra.run.dir={folder}"] if code else []
    done, seconds = measured([sys.executable, *watched, *arguments, *out_of_the_way], environment)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    err = "\n".join(line for line in lines if not line.startswith("import time:"))
    return Answer(done.returncode, done.stdout, err, imported, seconds, folder)


@pytest.fixture(scope="module")
def ask(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Answer]:
    """The answer to a command, run once for all tests."""
    known: dict[str, Answer] = {}

    def once(name: str) -> Answer:
        if name not in known:
            known[name] = answer(name, environment, tmp_path_factory.mktemp("run"), "-X", "importtime")
        return known[name]

    return once


@pytest.fixture(scope="module")
def slower(environment: dict[str, str]) -> Callable[[int], float]:
    """How much slower than expected torch's own import is, measured once for each further try of all tests."""

    @functools.cache
    def measure(number: int) -> float:
        return max(1.0, measured([sys.executable, "-c", "import torch"], environment)[1] / TORCH)

    return measure


def best_share(first: float, again: Callable[[], float], slower: Callable[[int], float]) -> float:
    """The smallest share of its budget that an answer took. A busy or slower machine makes even CPU time longer, by
    turns, so what is over its budget is asked again, a few times over, each time as torch's own import is slower."""
    shares = itertools.chain([first], (again() / slower(number) for number in itertools.count(1)))
    return quickest(lambda: next(shares), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_answers_within_its_budget(
    name: str,
    ask: Callable[[str], Answer],
    slower: Callable[[int], float],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    assert ask(name).code == COMMANDS[name][1], ask(name).err

    # Watched, it is slower than a user has it: it is asked again unwatched.
    def unwatched() -> float:
        return answer(name, environment, tmp_path).seconds / BUDGET

    assert best_share(ask(name).seconds / BUDGET, unwatched, slower) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_imports_torch_but_neither_lightning_nor_the_compiler(name: str, ask: Callable[[str], Answer]) -> None:
    assert "torch" in ask(name).imported
    assert not ask(name).imported & SLOW


@pytest.mark.slow
def test_catalogue_of_blocks_needs_no_hydra(ask: Callable[[str], Answer]) -> None:
    assert "hydra" not in ask("catalogue").imported


@pytest.mark.slow
def test_help_lists_the_blocks_and_the_other_door(ask: Callable[[str], Answer]) -> None:
    help_text = ask("help").out
    attention = next(line for line in help_text.splitlines() if line.startswith("model/attention: "))
    assert {"gqa", "kda", "mha", "mla", "mqa", "sliding_window"} <= set(attention.partition(": ")[2].split(", "))
    model = next(line for line in help_text.splitlines() if line.startswith("model: "))
    assert {"tiny", "deepseek_v2_lite", "file", "pretrained"} <= set(model.partition(": ")[2].split(", "))
    for kind in ("position", "ffn", "gating", "experts", "norm", "residual"):
        assert f"model/{kind}: " in help_text
    assert "blockwright train fit|validate|test|predict" in help_text
    assert ask("help").err == ""


@pytest.mark.slow
def test_refused_configuration_leaves_nothing_of_a_run_behind(ask: Callable[[str], Answer]) -> None:
    left = {p.name for p in ask("refusal").folder.iterdir()}
    assert left <= {".hydra", "train.log"}  # Hydra's own, made before any check


def helped(names: list[str], environment: dict[str, str]) -> dict[str, tuple[int, str, float, list[str]]]:
    """Of each command's help: the exit code, what it said, its CPU-seconds without torch and what was imported."""
    order = [[name for name in names if (name in WITHOUT_TORCH) == without] for without in (True, False)]
    program = [sys.executable, "-c", HELP, json.dumps(order)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    answers = {name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert answers.keys() == set(names), done.stderr
    return answers


@pytest.mark.slow
def test_help_of_every_command_needs_no_model(environment: dict[str, str], slower: Callable[[int], float]) -> None:
    share = BUDGET / 2  # torch takes the other half
    for name, (code, said, seconds, imported) in helped(list(offers()), environment).items():
        assert code == 0 and f"blockwright {name}" in said, (name, said)
        assert not SLOW & set(imported), name
        assert name not in WITHOUT_TORCH or "torch" not in imported, name

        def again(name: str = name) -> float:
            return helped([name], environment)[name][2] / share

        assert best_share(seconds / share, again, slower) <= 1, name
