"""A real Kubernetes API server says what it thinks of what the launcher sends. Skipped where there is none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apiserver
import pytest
from warm import Warm
from wrong_manifests import GOOD, IMAGE, WRONG, manifest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
VERDICTS = json.loads((HERE / "verdicts.json").read_text())
RESTRICTED = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "restricted", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
}
pytestmark = pytest.mark.skipif(bool(apiserver.missing()), reason=apiserver.missing() or "none")
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with apiserver.served(tmp_path_factory.mktemp("apiserver")) as config:
        yield config


@pytest.fixture
def kubectl(cluster: Path) -> Kubectl:
    """Calls the real kubectl."""

    def call(*arguments: str, given: Any = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": apiserver.search_path(), "KUBECONFIG": str(cluster)}
        text = None if given is None else json.dumps(given)
        return subprocess.run(
            ["kubectl", *arguments], input=text, env=environment, capture_output=True, text=True, check=False
        )

    return call


def _verdict(kubectl: Kubectl, manifest: Any, namespace: str) -> str:
    done = kubectl("create", "-n", namespace, "--dry-run=server", "--validate=strict", "-f", "-", given=manifest)
    return "refused" if done.returncode else "warned" if "would violate PodSecurity" in done.stderr else "accepted"


def test_server_says_what_was_recorded_of_the_sixty_manifests(kubectl: Kubectl) -> None:
    kubectl("apply", "--server-side", "-f", "-", given=RESTRICTED)
    has_sets = bool(kubectl("api-resources", "--api-group=jobset.x-k8s.io", "-o", "name").stdout)
    other = {}
    for case in (*GOOD, *WRONG):
        if "jobset" in case and not has_sets:
            continue
        for namespace, column in (("default", "server"), ("restricted", "restricted")):
            recorded = VERDICTS[case][column]
            expected = "warned" if "would violate" in recorded else recorded.partition(":")[0].partition(",")[0]
            if (said := _verdict(kubectl, manifest(case), namespace)) != expected:
                other[f"{case} in {namespace}"] = f"{said}, but {recorded}"
    assert not other


def test_launcher_checks_creates_and_attaches(
    kubectl: Kubectl, cluster: Path, warm: Warm, environment: dict[str, str], small: list[str], tmp_path: Path
) -> None:
    """Without controllers no job gets a pod, so the launcher is stopped once it has created both."""
    settings = {**environment, "KUBECONFIG": str(cluster), "PATH": apiserver.search_path()}
    options = ["-m", "hydra/launcher=kubernetes", f"hydra.launcher.image={IMAGE}", "hydra.launcher.namespace=training"]

    def start(*more: str) -> Any:
        sweep = [str(ROOT / "train.py"), *options, *small, "seed=0,1", "hydra.sweep.dir=sweep"]
        return warm.start(*(more or sweep), cwd=tmp_path, env=settings, merge=True)

    def jobs() -> dict[str, str]:
        listed = json.loads(kubectl("get", "jobs", "-n", "training", "-o", "json").stdout)["items"]
        return {one["metadata"]["name"]: one["metadata"]["uid"] for one in listed}

    process = start()
    said, _ = process.communicate()
    assert process.returncode == 64 and "does not exist" in said, said
    applied = kubectl("apply", "-k", str(ROOT / "deploy/kubernetes"))
    assert applied.returncode == 0, applied.stderr
    seen: list[dict[str, str]] = []
    for _ in range(2):  # the second one attaches
        process, until = start(), time.monotonic() + 120
        watches = re.compile(r"job 1: \S+ is (created|there)")  # and so handles signals
        while not watches.search(process.read()) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        process.send_signal(2)
        said, _ = process.communicate()
        assert process.returncode == 75 and "2 jobs continue in the cluster" in said, said
        seen.append(jobs())
    assert len(seen[0]) == 2 and seen[0] == seen[1]
    process = start("-m", "blockwright.lab.sweep", "status", str(tmp_path / "sweep"))
    said, _ = process.communicate()
    assert process.returncode == 0 and "2 waiting" in said, said
