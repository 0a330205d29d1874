"""Processes of jobs: a fork is what a new interpreter is, but for the seconds of its imports."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import until

from blockwright.lab.sweep import forking
from blockwright.lab.sweep.forking import Process, Processes
from blockwright.registry import ConfigError
from blockwright.training.result import Result
from blockwright.training.stops import SIGNALS

SAYS = """
import json, os, signal, sys, time
print(json.dumps({
    "argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path[0], "parent": os.getppid(), "A": os.environ.get("A"),
    "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])], "stdin": sys.stdin.read(),
    "handlers": [
        signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN),  # the latter under nohup
        *[signal.getsignal(s) is signal.SIG_DFL for s in (signal.SIGTERM, signal.SIGUSR1)],
    ],
}))
print("to stderr", file=sys.stderr)
if "stays" in sys.argv:
    time.sleep(60)
if "raises" in sys.argv:
    raise RuntimeError("it broke")
import atexit
atexit.register(print, "at exit")
sys.exit(int(sys.argv[-1]) if sys.argv[-1].isdigit() else sys.argv[-1])
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (file := tmp_path / "says.py").write_text(SAYS)
    monkeypatch.setattr(forking, "IMPORTED", ())
    return file


@pytest.fixture(params=["forks", "interpreters"])
def processes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Both kinds, in a folder with a space."""
    if request.param == "interpreters":
        monkeypatch.setattr(sys, "platform", "darwin")
    (where := tmp_path / "a folder").mkdir()
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    with Processes(str(where), {**os.environ, "A": "b"}, lock) as found:
        yield found
    os.close(lock)


def start(processes: Processes, log: Path, *arguments: str) -> Process:
    with log.open("ab") as file:
        return processes.start(arguments, file)


def ended(process: Process) -> int:
    until(lambda: process.poll() is not None)
    return process.returncode


@pytest.mark.parametrize(("how", "code", "last"), [("0", 0, "at exit"), ("75", 75, "at exit"), ("no", 1, "at exit")])
def test_job_has_its_arguments_folder_environment_output_and_exit_code(
    how: str, code: int, last: str, processes: Processes, script: Path, tmp_path: Path
) -> None:
    (log := tmp_path / "log").write_text("before\n")
    assert ended(start(processes, log, str(script), "a b", "é", how)) == code
    lines = log.read_text().splitlines()
    said = json.loads(next(line for line in lines if line.startswith("{")))
    assert lines[0] == "before" and "to stderr" in lines and last in lines
    assert (said["argv"], said["cwd"], said["A"]) == (["a b", "é", how], str(tmp_path / "a folder"), "b")
    assert (said["path"], said["blocked"], said["stdin"]) == (str(tmp_path), [], "")
    assert said["handlers"] == [True, True, True]


def test_module_is_found_in_the_folder_of_the_jobs(processes: Processes, script: Path, tmp_path: Path) -> None:
    (tmp_path / "a folder" / "mine.py").write_text(SAYS)
    assert ended(start(processes, tmp_path / "log", "-m", "mine", "3")) == 3


def test_error_is_a_traceback_in_the_log_and_code_1(processes: Processes, script: Path, tmp_path: Path) -> None:
    assert ended(start(processes, tmp_path / "log", str(script), "raises")) == 1
    assert "RuntimeError: it broke" in (tmp_path / "log").read_text()


def test_signal_ends_it_however_early_it_comes(processes: Processes, script: Path, tmp_path: Path) -> None:
    for wait in (0, 0, 0.2):
        process = start(processes, tmp_path / "log", str(script), "stays")
        time.sleep(wait)
        process.terminate()
        assert ended(process) == -signal.SIGTERM
    process = start(processes, tmp_path / "log", str(script), "stays")
    process.kill()
    assert ended(process) == -signal.SIGKILL
    process.kill()  # of no effect


def test_what_stops_jobs_does_not_stop_what_forks_them(script: Path, tmp_path: Path) -> None:
    """A terminal or a batch system sends its signal to all processes; the exit codes of jobs that save are needed."""
    with Processes(None, os.environ, 0) as processes:
        process = start(processes, tmp_path / "log", str(script), "stays")
        assert processes._parent is not None
        for signum in SIGNALS:
            processes._parent._process.send_signal(signum)
        time.sleep(0.2)
        process.terminate()
        assert ended(process) == -signal.SIGTERM


def test_loss_of_what_forks_is_one_message(script: Path, tmp_path: Path) -> None:
    with Processes(None, os.environ, 0) as processes:
        process = start(processes, tmp_path / "log", str(script), "stays")
        assert processes._parent is not None
        processes._parent._process.kill()
        processes._parent._process.wait()
        for ask in (process.poll, lambda: start(processes, tmp_path / "log", str(script), "0")):
            with pytest.raises(ConfigError, match="has ended"):
                ask()
        process.terminate()  # still reaches it


def test_jobs_are_new_interpreters_where_a_gpu_is(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("class accelerator:\n    is_available = staticmethod(lambda: True)\n")
    monkeypatch.setattr(forking, "IMPORTED", ("torch",))
    with Processes(str(tmp_path), os.environ, 0) as processes:
        assert ended(start(processes, tmp_path / "log", str(script), "0")) == 0
    said = (tmp_path / "log").read_text().splitlines()
    assert json.loads(next(line for line in said if line.startswith("{")))["parent"] == os.getpid()


@pytest.mark.slow
def test_forked_training_gives_what_a_new_interpreter_gives(
    small: list[str], environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for platform in ("linux", "darwin"):
        folder = tmp_path / platform
        with Processes(str(tmp_path), environment, 0) as processes:
            monkeypatch.setattr(sys, "platform", platform)
            job = start(processes, tmp_path / "log", "-m", "blockwright.train", *small, f"hydra.run.dir={folder}")
            while job.poll() is None:
                time.sleep(0.05)
        assert job.returncode == 0, (tmp_path / "log").read_text()
        found.append({k: v for k, v in Result.read(folder).metrics.items() if "loss" in k})
    assert found[0] == found[1] and found[0]["val/loss"] > 0
