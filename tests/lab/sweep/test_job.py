"""One job of a sweep; the training is a script of a few lines."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockwright.lab.sweep import job as one
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.__main__ import main
from blockwright.registry import ConfigError
from blockwright.training import jobs
from blockwright.training.result import Result
from blockwright.training.writing import write_json

Train = Callable[[str], None]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Replaces train.py by some lines, which see ``folder`` and ``arguments``."""
    script = tmp_path / "train.py"
    monkeypatch.setattr(jobs, "TRAIN", (str(script),))
    head = "import json, os, pathlib, signal, sys, time\narguments = sys.argv[1:]\n"
    head += "run = next(a for a in arguments if a.startswith('hydra.run.dir='))\n"
    head += "folder = pathlib.Path(run.partition('=')[2].strip(chr(39)))\n"
    return lambda lines: script.write_text(head + lines) and None


def test_stopped_run_is_resumed_from_its_own_folder(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("print(*arguments); sys.exit(75)")
    assert one.run_job(tmp_path, 0, ["seed=1"]) == 75
    checkpoint = tmp_path / "0" / "checkpoints" / "last.ckpt"
    monkeypatch.setattr(one, "newest", lambda folder: checkpoint if folder == tmp_path / "0" else None)
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert one.run_job(tmp_path, 0, ["seed=1"]) == 75
    assert f"seed=1 hydra.mode=RUN hydra.run.dir={tmp_path}/0" in (tmp_path / "0" / one.LOG).read_text()
    assert f"ckpt_path={checkpoint}" in (tmp_path / "0" / one.LOG).read_text()


def test_signal_is_forwarded(train: Train, tmp_path: Path) -> None:
    train("signal.signal(15, lambda *_: sys.exit(75))\nprint('ready', flush=True)\nwhile True: signal.pause()")
    log = tmp_path / "0" / one.LOG

    def stop() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert one.run_job(tmp_path, 0, []) == 75


def test_diverged_job_starts_from_scratch(train: Train, tmp_path: Path) -> None:
    (tmp_path / "0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "0" / "checkpoints" / "last.ckpt").touch()
    write_json(tmp_path / "0" / "results.json", {"status": "diverged", "reason": "nan"})
    train("sys.exit(0 if not (folder / 'checkpoints').exists() else 1)")
    assert one.run_job(tmp_path, 0, []) == 0
    assert list((tmp_path / "0").glob("checkpoints.diverged.*/last.ckpt"))


@pytest.mark.parametrize(
    ("name", "step"), [("mkdir", "made"), ("open", "written"), ("replace", "renamed"), ("unlink", "deleted")]
)
def test_storage_that_cannot_hold_checkpoints_is_refused(
    name: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(38, "Function not implemented")

    one.probe(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, name, fails)
    with pytest.raises(ConfigError, match=f"cannot be {step}.*Function not implemented.*object storage"):
        one.probe(tmp_path)


def test_storage_without_fsync_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ConfigError, match="flushed"):
        one.probe(tmp_path)


def test_user_runs_one_job_of_a_plan(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_stop_asks_the_process_that_holds_the_sweep(tmp_path: Path) -> None:
    import subprocess

    plans.write(tmp_path, {"kind": "grid", "metric": "m", "direction": "minimize", "jobs": []})
    code = "import sys, time\nfrom blockwright.lab.sweep import locks\nfrom pathlib import Path\n"
    code += "locks.take(Path(sys.argv[1])); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        assert main(["stop", str(tmp_path)]) == 0
        assert process.wait(timeout=20) == -signal.SIGTERM


def test_job_ends_though_its_log_cannot_be_written(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """More than a pipe holds, which would fill if nothing read it."""
    lines = [sys.executable, "-c", "print('x' * 100, flush=True); print('y' * 300_000)"]
    assert one._run(lines, None, Path("/dev/full"), dict(os.environ)) == 0
    shown = capfdbinary.readouterr()
    assert shown.out.count(b"y") == 300_000 and shown.err.count(b"no longer written to /dev/full") == 1
