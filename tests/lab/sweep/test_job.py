"""One job of a sweep, as a pod runs it; the training is a script of a few lines."""

from __future__ import annotations

import json
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


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a pod's environment; where its termination message is."""
    monkeypatch.setenv(one.INDEX, "0")
    monkeypatch.setenv("TERMINATION_MESSAGE", str(tmp_path / "message"))
    monkeypatch.setattr(one.time, "sleep", lambda s: None)
    monkeypatch.delenv("NODE_RANK", raising=False)
    return tmp_path / "message"


def said(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_pod_reports_what_its_run_came_to(train: Train, pod: Path, tmp_path: Path) -> None:
    train(
        "(folder / 'results.json').write_text(json.dumps({'status': 'completed', 'metrics': {'val/loss': 0.1 + 0.2}}))"
    )
    assert main(["job", str(tmp_path / "sweep"), "3", "--", "seed=1"]) == 0
    assert said(pod) == {"status": "completed", "metrics": {"val/loss": 0.1 + 0.2}, "code": 0}
    assert main(["job", str(tmp_path / "sweep"), "3", "--", "seed=1"]) == 0  # a pod that was lost after its end
    assert len((tmp_path / "sweep" / "3" / one.LOG).read_text().splitlines()) == 0


def test_refusal_is_final_and_its_reason_is_said(train: Train, pod: Path, tmp_path: Path) -> None:
    train("print('error: a.b = 1\\n  rule:   must not\\n  remedy: Write 2', file=sys.stderr); sys.exit(64)")
    assert one.run_job(tmp_path, 0, ["a.b=1"]) == 64
    assert said(pod) == {"status": "failed", "code": 64, "reason": "a.b = 1: must not. Write 2"}
    assert Result.read(tmp_path / "0").reason == said(pod)["reason"]


@pytest.mark.parametrize("code", ["sys.exit(1)", "os.kill(os.getpid(), 9)"])
def test_failure_that_may_be_tried_again_leaves_no_results(code: str, train: Train, pod: Path, tmp_path: Path) -> None:
    train(f"print('KeyError: x'); sys.stdout.flush(); {code}")
    assert one.run_job(tmp_path, 0, []) in (1, 137)
    assert not Result.read(tmp_path / "0").ended
    assert said(pod)["reason"] in ("KeyError: x", "killed by SIGKILL (out of memory?)")


def test_stopped_run_is_resumed_from_its_own_folder(
    train: Train, pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("print(*arguments); sys.exit(75)")
    assert one.run_job(tmp_path, 0, ["seed=1"]) == 75
    assert said(pod) == {"status": "stopped", "code": 75}
    checkpoint = tmp_path / "0" / "checkpoints" / "last.ckpt"
    monkeypatch.setattr(one, "newest", lambda folder: checkpoint if folder == tmp_path / "0" else None)
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert one.run_job(tmp_path, 0, ["seed=1"]) == 75
    assert f"seed=1 hydra.mode=RUN hydra.run.dir={tmp_path}/0" in (tmp_path / "0" / one.LOG).read_text()
    assert f"ckpt_path={checkpoint}" in (tmp_path / "0" / one.LOG).read_text()


def test_stops_without_progress_become_a_failure(train: Train, pod: Path, tmp_path: Path) -> None:
    train("sys.exit(75)")
    codes = [one.run_job(tmp_path, 0, []) for _ in range(5)]
    assert codes == [75, 75, 75, 1, 1]
    assert not Result.read(tmp_path / "0").ended


def test_second_node_writes_nothing_and_takes_its_rank(
    train: Train, pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(one.INDEX, "1")
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    train("sys.exit(40 + int(os.environ['NODE_RANK']))")
    assert one.run_job(tmp_path / "sweep", 0, []) == 41
    assert not (tmp_path / "sweep").exists() and not pod.exists()


def test_name_that_never_comes_is_refused(pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "no-such-pod.invalid")
    monkeypatch.setattr(one, "NAMES_S", 0)
    with pytest.raises(ConfigError, match="has no address"):
        one.run_job(tmp_path, 0, [])


def test_signal_is_forwarded(train: Train, pod: Path, tmp_path: Path) -> None:
    train("signal.signal(15, lambda *_: sys.exit(75))\nprint('ready', flush=True)\nwhile True: signal.pause()")
    log = tmp_path / "0" / one.LOG

    def stop() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert one.run_job(tmp_path, 0, []) == 75


def test_diverged_job_starts_from_scratch(train: Train, pod: Path, tmp_path: Path) -> None:
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


def test_message_fits_its_four_kibibytes() -> None:
    metrics = {f"some/figure/{i}": i / 3 for i in range(400)} | {"val/loss": 0.1}
    text = one.message(Result("failed", reason="x" * 9000, metrics=metrics, save_seconds=2.5), 70)
    assert len(text.encode()) <= one.LIMIT
    found = json.loads(text)
    assert found["metrics"]["val/loss"] == 0.1 and found["save_seconds"] == 2.5 and len(found["metrics"]) > 20


def test_message_keeps_the_figures_that_a_sweep_may_compare() -> None:
    metrics = {f"some/figure/{i}": i / 3 for i in range(400)} | {"val/reward": 0.5, "val/loss": 0.1}
    described = {name: {"unit": "", "better": None} for name in metrics}
    described["val/reward"] = {"unit": "a completion", "better": "more"}
    found = json.loads(one.message(Result.of({"status": "completed", "metrics": metrics, "figures": described}), 0))
    assert found["metrics"]["val/reward"] == 0.5 and found["figures"]["val/reward"]["better"] == "more"


def test_user_runs_one_job_of_a_plan(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(one.INDEX, raising=False)
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
