"""Sweeps whose pods are processes in the image of deploy/kubernetes/Dockerfile, as they are on a cluster.

That is uid 1000, a read-only root, no capabilities, namespaces and a grace period. What disturbs them changes no bit:
the losses are those of the same sweep without a cluster.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import image as images
import node as nodes
import pytest
from scripted_cluster import ScriptedCluster
from warm import Running, Warm
from wrong_manifests import IMAGE

from blockwright.plugins.kubernetes.render import ENTRY
from blockwright.training.result import Result

TRAIN = str(Path(__file__).resolve().parents[3] / "train.py")
WITHOUT = nodes.can_run() or images.can_build()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("pods"),
    pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT or "none"),
]
PATIENCE_S = 900
Launch = Callable[..., Running]


@pytest.fixture(scope="session")
def image() -> Iterator[images.Image]:
    builder = images.Builder(Path(tempfile.mkdtemp(dir="/var/tmp")))
    try:
        builder.base()
        builder.build("localhost/blockwright:test")
        yield builder.mount("localhost/blockwright:test")
    finally:
        builder.close()


@pytest.fixture
def node(kubectl: Path, tmp_path: Path, image: images.Image) -> Iterator[nodes.Node]:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    made = nodes.Node(ScriptedCluster(kubectl), tmp_path, image)
    yield made
    made.close()


@pytest.fixture
def launch(warm: Warm, tmp_path: Path, corpus_file: Path, environment: dict[str, str]) -> Iterator[Launch]:
    """Starts a sweep on the cluster."""
    (tmp_path / "claim").mkdir()
    corpus = tmp_path / "claim" / "corpus.txt"
    corpus.write_text(corpus_file.read_text())
    corpus.chmod(0o644)
    started: list[Running] = []
    run = ["model.n_layers=2", "model.d_model=64", "model.max_positions=64", "data=text", "data.sequence_length=32"]
    run += ["data.batch_size=2", "data.eval_batch_size=8", "data.eval_windows=4"]
    run += ["trainer.max_steps=60", "trainer.val_check_interval=30", "trainer.log_every_n_steps=1", "test=false"]
    run += ["callbacks.interruption.every_n_steps=5", "callbacks.report.sample_tokens=8"]

    def call(*arguments: str, folder: str = "sweep", on_cluster: bool = True) -> Running:
        where = ["data.corpus.files=" + ("/runs/corpus.txt" if on_cluster else str(corpus))]
        if on_cluster:
            where += [f"hydra.launcher.image={IMAGE}", "hydra/launcher=kubernetes", "hydra.launcher.grace_s=60"]
            where += [f"+hydra.launcher.env.{name}" for name in ("OMP_NUM_THREADS=1", "BLOCKWRIGHT_PRODUCTS=torch")]
        options = [*where, f"hydra.sweep.dir={folder}", *run, *arguments]
        variables = {**environment, **{k: os.environ[k] for k in ("PATH", "SCRIPTED_CLUSTER")}}
        variables["PROJECT_ROOT"] = str(tmp_path)
        started.append(warm.start(TRAIN, "-m", *options, cwd=tmp_path, env=variables, merge=True))
        return started[-1]

    yield call
    for process in [p for p in started if p.poll() is None]:  # of a test that has failed
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def losses(folder: Path, count: int) -> list[float]:
    results = [Result.read(folder / str(n)) for n in range(count)]
    assert [result.status for result in results] == ["completed"] * count, results
    return [result.metrics["val/loss"] for result in results]


def until(true: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def saved(tmp_path: Path, number: int) -> bool:
    return any(tmp_path.glob(f"claim/*/{number}/checkpoints/last.ckpt"))


def last_save(tmp_path: Path) -> float:
    return next(tmp_path.glob("claim/*/0/checkpoints/last.ckpt")).stat().st_mtime


def finish(process: Running) -> str:
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    return said


def test_image_is_that_of_the_dockerfile(image: images.Image) -> None:
    config = image.about["config"]
    assert config["User"] == "1000:1000" and config["Entrypoint"] == ENTRY[:3] and config["WorkingDir"] == "/tmp"
    assert "pip" not in json.dumps(image.about).lower()  # where pip looked, perhaps with a login, stays behind
    assert not [name for name in ("etc/pip.conf", "src", "usr/bin/gcc") if (image.root / name).exists()]


def test_disturbed_sweep_ends_as_an_undisturbed_one(node: nodes.Node, launch: Launch, tmp_path: Path) -> None:
    """A pod is killed with 9, one is deleted, the launcher is killed and started again."""
    rates = "optimizer.lr=0.005,0.02"
    first = launch(rates)
    plan = tmp_path / "sweep" / "plan.json"
    until(lambda: saved(tmp_path, 0) and saved(tmp_path, 1))
    name = json.loads(plan.read_text())["cluster"]["sweep"]
    for number, how in ((0, "kill"), (1, "delete")):
        pod = node.pod_of(f"train-{name}-{number}")
        assert pod is not None
        node.disturb(pod, how)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    said = finish(launch(rates))
    codes = sorted(int(line.split()[1]) for line in node.ended)
    assert codes == [0, 0, 75, 137], (codes, said)
    finish(launch(rates, folder="calm", on_cluster=False))
    assert losses(tmp_path / "sweep", 2) == losses(tmp_path / "calm", 2)
    log = next(tmp_path.glob("claim/*/0/job.log"))
    assert log.stat().st_uid == 1000 and "resumes from" in "".join(p.read_text() for p in tmp_path.glob("pods/*/log"))


def test_disturbed_run_on_two_machines_ends_as_an_undisturbed_one(
    node: nodes.Node, launch: Launch, tmp_path: Path
) -> None:
    """The second pod is evicted and later killed: both times the whole set comes back."""
    options = ["trainer=[ddp,sim]", "optimizer.lr=0.01"]
    process = launch(*options, "trainer.devices=1", "hydra.launcher.nodes=2")
    plan = tmp_path / "sweep" / "plan.json"
    until(lambda: saved(tmp_path, 0))
    owner = f"train-{json.loads(plan.read_text())['cluster']['sweep']}-0"
    for how in ("evict", "kill"):
        second, before = node.pod_of(owner, 1), len(node.ended)
        assert second is not None
        node.disturb(second, how)
        until(lambda before=before: len(node.ended) >= before + 2)  # type: ignore[misc]
        until(lambda: node.pod_of(owner, 0) and node.pod_of(owner, 1))
        if how == "evict":
            first = node.pod_of(owner, 0)
            assert first is not None
            until(lambda first=first: "resumes from" in first.log.read_text())  # type: ignore[misc]
            time_of = last_save(tmp_path)
            until(lambda then=time_of: last_save(tmp_path) > then)  # type: ignore[misc]
    finish(process)
    codes = [int(line.split()[1]) for line in node.ended]
    assert codes[:2] == [75, 75] and 137 in codes[2:4] and codes[-2:] == [0, 0], codes
    finish(launch(*options, "trainer.devices=2", folder="calm", on_cluster=False))
    assert losses(tmp_path / "sweep", 1) == losses(tmp_path / "calm", 1)
