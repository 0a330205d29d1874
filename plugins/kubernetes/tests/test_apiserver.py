"""The real thing: a Kubernetes API server says what it thinks of what the launcher sends. Skipped where there is none.

What finds, starts and stops it is tested everywhere, with stand-ins.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apiserver
import pytest
from warm import Warm
from wrong_manifests import CASES, IMAGE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
VERDICTS = json.loads((HERE / "verdicts.json").read_text())
RESTRICTED = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "restricted", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
}
needs_server = pytest.mark.skipif(bool(apiserver.missing()), reason=apiserver.missing() or "none")
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]
STAND_IN = """#!{python} -S
import json, os, signal, sys, time
with open(os.environ["STAND_INS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), os.getpid(), sys.argv[1:]]) + "\\n")
{body}
"""
SERVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"
ANSWERS = 'asked = open(os.environ["STAND_INS"]).read().count("readyz"); print("ok" if asked > 2 else "")'


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


@needs_server
def test_server_says_what_was_recorded_of_the_sixty_manifests(kubectl: Kubectl) -> None:
    kubectl("apply", "--server-side", "-f", "-", given=RESTRICTED)
    has_sets = bool(kubectl("api-resources", "--api-group=jobset.x-k8s.io", "-o", "name").stdout)
    other = {}
    for case, make in CASES.items():
        if "jobset" in case and not has_sets:
            continue
        for namespace, column in (("default", "server"), ("restricted", "restricted")):
            recorded = VERDICTS[case][column]
            expected = "warned" if "would violate" in recorded else recorded.partition(":")[0].partition(",")[0]
            if (said := _verdict(kubectl, make(), namespace)) != expected:
                other[f"{case} in {namespace}"] = f"{said}, but {recorded}"
    assert not other


@needs_server
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


# What starts the server, with stand-ins


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes programs that note how they are started; returns where."""

    def make(**bodies: str) -> Path:
        folder, noted = tmp_path / "assets", tmp_path / "noted"
        folder.mkdir()
        for name in apiserver.PROGRAMS:
            body = bodies.get(name.replace("-", "_"), "")
            (folder / name).write_text(STAND_IN.format(python=sys.executable, body=body))
            (folder / name).chmod(0o755)
        monkeypatch.setenv("KUBEBUILDER_ASSETS", str(folder))
        monkeypatch.setenv("STAND_INS", str(noted))
        return noted

    return make


def _started(noted: Path) -> dict[str, tuple[int, dict[str, str]]]:
    calls = [json.loads(line) for line in noted.read_text().splitlines()]
    return {name: (pid, dict(flag.split("=", 1) for flag in flags if "=" in flag)) for name, pid, flags in calls}


def test_server_is_found_started_waited_for_and_stopped(stand_ins: Callable[..., Path], tmp_path: Path) -> None:
    noted = stand_ins(etcd=SERVES, kube_apiserver=SERVES, kubectl=ANSWERS)
    assert apiserver.missing() == ""
    with apiserver.served(tmp_path) as config:
        calls = _started(noted)
        running = [calls[name][0] for name in ("etcd", "kube-apiserver")]
        assert all(Path(f"/proc/{pid}").exists() for pid in running)
        (etcd, server) = (calls[name][1] for name in ("etcd", "kube-apiserver"))
        assert server["--etcd-servers"] == etcd["--listen-client-urls"] == etcd["--advertise-client-urls"]
        (where,) = json.loads(config.read_text())["clusters"]
        assert where["cluster"]["server"] == f"https://127.0.0.1:{server['--secure-port']}"
        token = json.loads(config.read_text())["users"][0]["user"]["token"]
        assert Path(server["--token-auth-file"]).read_text().startswith(f"{token},")
        assert noted.read_text().count("readyz") == 3  # the first two were not answered
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)


def test_server_that_ends_or_never_answers_is_reported(stand_ins: Callable[..., Path], tmp_path: Path) -> None:
    noted = stand_ins(etcd=SERVES, kube_apiserver="print('unknown flag: --x'); sys.exit(1)", kubectl="time.sleep(0.3)")
    with (
        pytest.raises(RuntimeError, match=r"kube-apiserver ended with 1: unknown flag: --x"),
        apiserver.served(tmp_path),
    ):
        pass
    assert not Path(f"/proc/{_started(noted)['etcd'][0]}").exists()
    (tmp_path / "assets" / "kube-apiserver").write_text(STAND_IN.format(python=sys.executable, body=SERVES))
    with pytest.raises(RuntimeError, match=r"not ready after 0\.1 s"), apiserver.served(tmp_path, ready_s=0.1):
        pass
    assert not any(Path(f"/proc/{pid}").exists() for pid, _ in _started(noted).values())


def test_absent_server_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    assert apiserver.missing().startswith("no etcd, kube-apiserver, kubectl, openssl on PATH or in KUBEBUILDER_ASSETS")
