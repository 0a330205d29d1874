"""One job of a sweep as a pod runs it; the training is a script of a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockwright.lab.sweep import job
from blockwright.plugins.kubernetes import pod as one
from blockwright.registry import ConfigError
from blockwright.training import jobs
from blockwright.training.jobs import HOST
from blockwright.training.result import Result

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
    found = "{'status': 'completed', 'metrics': {'val/loss': 0.1 + 0.2}}"
    train(f"(folder / 'results.json').write_text(json.dumps({found}))")
    assert one.main([str(tmp_path / "sweep"), "3", "--", "seed=1"]) == 0
    assert said(pod) == {"status": "completed", "metrics": {"val/loss": 0.1 + 0.2}, "code": 0}
    train("sys.exit(1)")
    assert one.main([str(tmp_path / "sweep"), "3", "--", "seed=1"]) == 0  # a pod that was lost after its end
    assert len((tmp_path / "sweep" / "3" / job.LOG).read_text().splitlines()) == 0


def test_pod_starts_from_the_job_that_its_own_follows(train: Train, pod: Path, tmp_path: Path) -> None:
    train(f"assert os.environ[{HOST!r}] == 'cluster'; (folder / 'argv').write_text(' '.join(arguments))")
    assert one.main(["--after", "0", str(tmp_path), "1", "--", "seed=1"]) == 0
    assert f"init_from={tmp_path}/0" in (tmp_path / "1" / "argv").read_text().split()
    assert one.main(["--after", "0", "--from-step", "8", str(tmp_path), "2", "--", "seed=1"]) == 0
    assert f"ckpt_path={tmp_path}/0/checkpoints/step_8.ckpt" in (tmp_path / "2" / "argv").read_text().split()


def test_refusal_is_final_and_its_reason_is_said(train: Train, pod: Path, tmp_path: Path) -> None:
    train("print('error: a.b = 1\\n  rule:   must not\\n  remedy: Write 2', file=sys.stderr); sys.exit(64)")
    assert one.run(tmp_path, 0, ["a.b=1"]) == 64
    assert said(pod) == {"status": "failed", "code": 64, "reason": "a.b = 1: must not. Write 2"}
    assert Result.read(tmp_path / "0").reason == said(pod)["reason"]


@pytest.mark.parametrize("code", ["sys.exit(1)", "os.kill(os.getpid(), 9)"])
def test_failure_that_may_be_tried_again_leaves_no_results(code: str, train: Train, pod: Path, tmp_path: Path) -> None:
    train(f"print('KeyError: x'); sys.stdout.flush(); {code}")
    assert one.run(tmp_path, 0, []) in (1, 137)
    assert not Result.read(tmp_path / "0").ended
    assert said(pod)["reason"] in ("KeyError: x", "killed by SIGKILL (out of memory?)")


def test_second_node_writes_nothing_and_takes_its_rank(
    train: Train, pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(one.INDEX, "1")
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    train("sys.exit(40 + int(os.environ['NODE_RANK']))")
    assert one.run(tmp_path / "sweep", 0, []) == 41
    assert not (tmp_path / "sweep").exists() and not pod.exists()


def test_name_that_never_comes_is_refused(pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "no-such-pod.invalid")
    monkeypatch.setattr(one, "NAMES_S", 0)
    with pytest.raises(ConfigError, match="has no address"):
        one.run(tmp_path, 0, [])


def test_message_fits_its_four_kibibytes_and_keeps_the_figures_that_a_sweep_may_compare() -> None:
    metrics = {f"some/figure/{i}": i / 3 for i in range(400)} | {"val/reward": 0.5, "val/loss": 0.1}
    text = one.message(Result("failed", reason="x" * 9000, metrics=metrics, save_seconds=2.5), 70)
    found = json.loads(text)
    assert len(text.encode()) <= one.LIMIT and found["save_seconds"] == 2.5
    assert found["metrics"]["val/loss"] == 0.1 and len(found["metrics"]) > 20
    described = {name: {"unit": "", "better": None} for name in metrics}
    described["val/reward"] = {"unit": "a completion", "better": "more"}
    found = json.loads(one.message(Result.of({"status": "completed", "metrics": metrics, "figures": described}), 0))
    assert found["metrics"]["val/reward"] == 0.5 and found["figures"]["val/reward"]["better"] == "more"


def test_stops_without_progress_become_a_failure(train: Train, pod: Path, tmp_path: Path) -> None:
    train("sys.exit(75)")
    codes = [one.run(tmp_path, 0, []) for _ in range(5)]
    assert codes == [75, 75, 75, 1, 1]
    assert not Result.read(tmp_path / "0").ended
