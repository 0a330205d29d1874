"""``python …`` without its imports: forked from a process that has loaded torch, Lightning and this project.

Each command has a process of its own, with its exit code, output, folder, environment and signals. It saves the eight
CPU seconds that a new interpreter spends on imports and on what a first training looks up. ``Warm`` is what tests use;
run as a program, this file is the process that forks.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOADED = (
    "torch",
    "blockwright.train",
    "blockwright.training.entry.cli",
    "blockwright.training.entry.execute",
    "blockwright.lab.run_report",
    "blockwright.lab.sweep.__main__",
    "blockwright.lab.sweep.search",
    "hydra_plugins.blockwright_kubernetes.launcher",
    "hydra_plugins.blockwright_optuna.sweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher",
    "torch.utils.tensorboard",
)

FIRST = (
    *("data=sorting", "model.n_layers=2", "model.d_model=32", "trainer.max_steps=2", "trainer.val_check_interval=1"),
    *("callbacks.report.sample_tokens=2", "test=false", "logger=csv"),
)


class Running:
    """A command at work, in a process group of its own; like ``subprocess.Popen``.

    Attributes:
        pid: of its process
        returncode: its exit code, or minus the signal that ended it; None while it runs
    """

    def __init__(self, warm: Warm, pid: int, said: tempfile.TemporaryDirectory[str], out: str, err: str) -> None:
        self._warm, self.pid, self._said = warm, pid, said
        self._out, self._err = Path(out), Path(err)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its return code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._warm._ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended; after ``timeout`` seconds it is killed.

        Raises:
            subprocess.TimeoutExpired: it was
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout, self._out.read_text(), self._err.read_text())
            time.sleep(0.02)
        return self._out.read_text(), self._err.read_text()

    def read(self) -> str:
        """What it has written to stdout so far."""
        return self._out.read_text()


class Warm:
    """Starts commands. A command is what follows ``python``: ``FILE …``, ``-m MODULE …`` or ``-c CODE …``.

    Args:
        environment: of the process that forks; its threads of OpenMP are the commands'
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, text=True, **pipes)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str],
        input: str = "",
        merge: bool = False,
        log: Path | None = None,
    ) -> Running:
        """Start a command.

        Args:
            input: its stdin
            merge: whether stderr goes where stdout goes
            log: a file that both are appended to
        """
        said = tempfile.TemporaryDirectory(prefix="blockwright-said-")
        Path(said.name, "in").write_text(input)
        for name in ("out", "err"):  # for who reads before the command has written
            Path(said.name, name).touch()
        out = str(log or f"{said.name}/out")
        err = out if merge or log else f"{said.name}/err"
        files = {"in": f"{said.name}/in", "out": out, "err": err}
        pid = self._ask({"arguments": arguments, "cwd": str(cwd), "env": dict(env), **files})
        return Running(self, pid, said, out, err)

    def run(self, *arguments: str, timeout: float = 300, **given: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; arguments as of ``start``."""
        process = self.start(*arguments, **given)
        out, err = process.communicate(timeout)
        assert process.returncode is not None
        return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()


def _serve() -> dict[str, Any] | None:
    """Fork for each command that is asked for. In the fork, what was asked; None at the end.

    Commands that still run at the end, because their test has failed, are killed.
    """
    running: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        else:
            answer = os.fork()
            if not answer:
                return request
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def _become(request: dict[str, Any]) -> None:
    """Be ``python ARGUMENTS``."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, name, flags in ((0, "in", os.O_RDONLY), (1, "out", mode), (2, "err", mode)):
        file = os.open(request[name], flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 # the old one may hold more of what was asked for
    first, *rest = request["arguments"]
    beside = {"-m": request["cwd"], "-c": request["cwd"]}.get(first, str(Path(first).parent))
    sys.path[:1] = [beside, *filter(None, request["env"].get("PYTHONPATH", "").split(":"))]
    _forget_plugins()  # PYTHONPATH may hold others
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        importlib.import_module("blockwright.lab.sweep.forking").run(request["arguments"])


def _forget_plugins() -> None:
    """Make the fork look again which packages offer blocks, presets and kernels."""
    importlib.import_module("blockwright.registry.index").forget()
    importlib.import_module("blockwright.registry.presets")._of_plugins.cache_clear()
    seam = importlib.import_module("blockwright.blocks.kernels.seam")
    seam._load.cache_clear()
    seam.chain.cache_clear()


def _prepare_hydra() -> None:
    """Make Hydra remember what it reads, parses and composes; its grammar is learnt at the first override."""
    hydra_once = importlib.import_module("hydra_once")
    hydra_once.install()
    parser = importlib.import_module("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    parser.parse_overrides(["a/b=c", "a.b=1", "+a.b=[1,2.5,null]", "++a.b={c: d, e: /f/g.txt}", "~a", "a.b='c d'"])


def _compose_often_chosen() -> None:
    """What most commands choose: they read no file of it again."""
    composing = importlib.import_module("blockwright.training.configuration.composing")
    for choices in ([], ["data=text"], ["data=sorting"], ["model=tiny", "data=sorting", "logger=none"]):
        composing.compose_with_hydra(choices)
    importlib.import_module("hydra.core.global_hydra").GlobalHydra.instance().clear()


def _train_once() -> None:
    """Train for two steps: all that a first training loads and looks up, a fork has at once.

    What a training leaves in its process is taken back. Of what is not, the environment and the folder are a fork's
    own, and every command seeds itself.
    """
    products = importlib.import_module("blockwright.blocks.kernels.products")
    composing = importlib.import_module("blockwright.training.configuration.composing")
    execute = importlib.import_module("blockwright.training.entry.execute").execute
    prepare = importlib.import_module("blockwright.training.entry.preflight").prepare
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    loggers = list(logging.root.handlers), logging.root.level
    with contextlib.ExitStack() as stack:
        folder, nowhere = stack.enter_context(tempfile.TemporaryDirectory()), stack.enter_context(open(os.devnull, "w"))
        for context in (contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)):
            stack.enter_context(context)
        stack.enter_context(warnings.catch_warnings())
        execute(
            prepare(
                composing.compose_config(
                    [*FIRST, f"paths.log_dir={folder}", f"paths.data_dir={folder}"], output_dir=folder
                )
            )
        )
    logging.root.handlers[:], logging.root.level = loggers
    products.use(products.Choice())
    assert {number: signal.getsignal(number) for number in heard} == heard


if __name__ == "__main__":
    _prepare_hydra()
    sys.path[0] = str(ROOT)
    for name in LOADED:
        with suppress(ImportError):  # of an extra; a command that needs it says so itself
            importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    _compose_often_chosen()
    _train_once()
    gc.collect()
    gc.freeze()  # what a collection would touch, every fork would copy
    gc.set_threshold(100_000, 10, 10)  # as in the tests' own processes
    if asked := _serve():
        importlib.import_module("blockwright.lab.sweep.forking").end(functools.partial(_become, asked))
