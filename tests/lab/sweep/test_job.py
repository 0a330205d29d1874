"""One job of a sweep; the training is a script of a few lines."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from stand_in import until

from blockwright.lab.sweep import forking
from blockwright.lab.sweep import job as one
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.__main__ import main
from blockwright.lab.sweep.forking import Processes
from blockwright.registry import ConfigError
from blockwright.registry.folder import write_json
from blockwright.training import jobs
from blockwright.training.result import SIGNALS, Result


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Replaces train.py by some lines, which see ``folder`` and ``arguments``."""
    script = tmp_path / "train.py"
    monkeypatch.setattr(jobs, "TRAIN", (str(script),))
    head = "import json, os, pathlib, signal, sys, time\narguments = sys.argv[1:]\n"
    head += "run = next(a for a in arguments if a.startswith('hydra.run.dir='))\n"
    head += "folder = pathlib.Path(run.partition('=')[2].strip(chr(39)))\n"
    return lambda lines: script.write_text(head + lines) and None


def test_stopped_run_is_resumed_from_its_own_folder(train, tmp_path, monkeypatch):
    train("print(*arguments); sys.exit(75)")
    assert one.run_job(tmp_path, 0, ["seed=1"]) == 75
    checkpoint = tmp_path / "0" / "checkpoints" / "last.ckpt"
    monkeypatch.setattr(one, "newest", lambda folder: checkpoint if folder == tmp_path / "0" else None)
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert one.run_job(tmp_path, 0, ["seed=1"]) == 75
    assert f"seed=1 hydra.mode=RUN hydra.run.dir={tmp_path}/0" in (tmp_path / "0" / one.LOG).read_text()
    assert f"ckpt_path={checkpoint}" in (tmp_path / "0" / one.LOG).read_text()


def test_signal_is_forwarded(train, tmp_path):
    train("signal.signal(15, lambda *_: sys.exit(75))\nprint('ready', flush=True)\nwhile True: signal.pause()")
    log = tmp_path / "0" / one.LOG

    def stop():
        while not (log.exists() and "ready" in log.read_text()):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert one.run_job(tmp_path, 0, []) == 75


def test_diverged_job_starts_from_scratch(train, tmp_path):
    (tmp_path / "0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "0" / "checkpoints" / "last.ckpt").touch()
    write_json(tmp_path / "0" / "results.json", {"status": "diverged", "reason": "nan"})
    train("sys.exit(0 if not (folder / 'checkpoints').exists() else 1)")
    assert one.run_job(tmp_path, 0, []) == 0
    assert list((tmp_path / "0").glob("checkpoints.diverged.*/last.ckpt"))


def test_user_runs_one_job_of_a_plan(train, tmp_path, monkeypatch):
    jobs_ = [{"job": n, "overrides": [f"seed={n}"]} for n in range(2)]
    plans.write(tmp_path / "sweep", {"kind": "grid", "metric": "val/loss", "direction": "minimize", "jobs": jobs_})
    train("sys.exit(0 if 'seed=1' in arguments else 3)")
    assert main(["job", str(tmp_path / "sweep"), "1"]) == 0
    assert Result.read(tmp_path / "sweep" / "1") == Result("completed")
    assert main(["job", str(tmp_path / "sweep"), "0"]) == 3
    assert Result.read(tmp_path / "sweep" / "0").status == "failed"
    with pytest.raises(ConfigError, match="not in the sweep's plan"):
        main(["job", str(tmp_path / "sweep"), "7"])
    with pytest.raises(ConfigError, match="Write its number"):
        main(["job", str(tmp_path / "sweep")])
    with pytest.raises(ConfigError, match="is an option of job"):
        main(["status", str(tmp_path / "sweep"), "--", "seed=1"])


def test_stop_asks_the_process_that_holds_the_sweep(tmp_path):
    import subprocess

    plans.write(tmp_path, {"kind": "grid", "metric": "m", "direction": "minimize", "jobs": []})
    code = "import sys, time\nfrom blockwright.training import claims\nfrom pathlib import Path\n"
    code += "claims.take(Path(sys.argv[1])); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        assert main(["stop", str(tmp_path)]) == 0
        assert process.wait(timeout=20) == -signal.SIGTERM


def test_job_ends_though_its_log_cannot_be_written(capfdbinary):
    lines = [sys.executable, "-c", "print('x' * 100, flush=True); print('y' * 300_000)"]
    assert one._run(lines, None, Path("/dev/full"), dict(os.environ)) == 0
    shown = capfdbinary.readouterr()
    assert shown.out.count(b"y") == 300_000 and shown.err.count(b"no longer written to /dev/full") == 1


def test_storage_that_cannot_hold_checkpoints_is_refused(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(38, "Function not implemented")

    one.probe(tmp_path)
    assert not list(tmp_path.iterdir())
    steps = {"mkdir": "made", "open": "written", "replace": "renamed", "unlink": "deleted", "fsync": "flushed"}
    for name, step in steps.items():
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"cannot be {step}"):
            patch.setattr(os if name == "fsync" else Path, name, fails)
            one.probe(tmp_path)


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
def script(tmp_path, monkeypatch):
    (file := tmp_path / "says.py").write_text(SAYS)
    monkeypatch.setattr(forking, "IMPORTED", ())
    return file


@pytest.fixture(params=["forks", "interpreters"])
def processes(request, tmp_path, monkeypatch):
    """Both kinds, in a folder with a space."""
    if request.param == "interpreters":
        monkeypatch.setattr(sys, "platform", "darwin")
    (where := tmp_path / "a folder").mkdir()
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    with Processes(str(where), {**os.environ, "A": "b"}, lock) as found:
        yield found
    os.close(lock)


def start(processes, log, *arguments):
    with log.open("ab") as file:
        return processes.start(arguments, file)


def ended(process):
    until(lambda: process.poll() is not None)
    return process.returncode


@pytest.mark.parametrize(("how", "code", "last"), [("0", 0, "at exit"), ("75", 75, "at exit"), ("no", 1, "at exit")])
def test_job_has_its_arguments_folder_environment_output_and_exit_code(how, code, last, processes, script, tmp_path):
    (log := tmp_path / "log").write_text("before\n")
    assert ended(start(processes, log, str(script), "a b", "é", how)) == code
    lines = log.read_text().splitlines()
    said = json.loads(next(line for line in lines if line.startswith("{")))
    assert lines[0] == "before" and "to stderr" in lines and last in lines
    assert (said["argv"], said["cwd"], said["A"]) == (["a b", "é", how], str(tmp_path / "a folder"), "b")
    assert (said["path"], said["blocked"], said["stdin"]) == (str(tmp_path), [], "")
    assert said["handlers"] == [True, True, True]


def test_module_is_found_in_the_folder_of_the_jobs_and_an_error_is_a_traceback(processes, script, tmp_path):
    (tmp_path / "a folder" / "mine.py").write_text(SAYS)
    assert ended(start(processes, tmp_path / "log", "-m", "mine", "3")) == 3
    assert ended(start(processes, tmp_path / "log", str(script), "raises")) == 1
    assert "RuntimeError: it broke" in (tmp_path / "log").read_text()


def test_signal_ends_it_however_early_it_comes(processes, script, tmp_path):
    for wait in (0, 0, 0.2):
        process = start(processes, tmp_path / "log", str(script), "stays")
        time.sleep(wait)
        process.terminate()
        assert ended(process) == -signal.SIGTERM
    process = start(processes, tmp_path / "log", str(script), "stays")
    process.kill()
    assert ended(process) == -signal.SIGKILL
    process.kill()  # of no effect


def test_what_stops_jobs_does_not_stop_what_forks_them(script, tmp_path):
    with Processes(None, os.environ, 0) as processes:
        process = start(processes, tmp_path / "log", str(script), "stays")
        for signum in SIGNALS:
            processes._parent._process.send_signal(signum)
        time.sleep(0.2)
        process.terminate()
        assert ended(process) == -signal.SIGTERM


def test_loss_of_what_forks_is_one_message(script, tmp_path):
    with Processes(None, os.environ, 0) as processes:
        process = start(processes, tmp_path / "log", str(script), "stays")
        processes._parent._process.kill()
        processes._parent._process.wait()
        for ask in (process.poll, lambda: start(processes, tmp_path / "log", str(script), "0")):
            with pytest.raises(ConfigError, match="has ended"):
                ask()
        process.terminate()  # still reaches it


def test_jobs_are_new_interpreters_where_a_gpu_is(script, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("class accelerator:\n    is_available = staticmethod(lambda: True)\n")
    monkeypatch.setattr(forking, "IMPORTED", ("torch",))
    with Processes(str(tmp_path), os.environ, 0) as processes:
        assert ended(start(processes, tmp_path / "log", str(script), "0")) == 0
    said = (tmp_path / "log").read_text().splitlines()
    assert json.loads(next(line for line in said if line.startswith("{")))["parent"] == os.getpid()


@pytest.mark.slow
def test_forked_training_gives_what_a_new_interpreter_gives(small, environment, tmp_path, monkeypatch):
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
