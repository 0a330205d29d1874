"""A real API server and its store, where kube-apiserver, etcd and kubectl are found: in KUBEBUILDER_ASSETS, or on PATH.

There are no controllers and no nodes, so jobs are stored and checked, and get no pods.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("etcd", "kube-apiserver", "kubectl", "openssl")
READY_S = 120
STOP_S = 20
TOKEN = "tests"  # of the only user, who may do everything


def search_path() -> str:
    """PATH, after the folder that other projects' tests name."""
    return os.pathsep.join(filter(None, (os.environ.get("KUBEBUILDER_ASSETS"), os.environ.get("PATH"))))


def missing() -> str:
    """Why there is no server; empty if there can be one."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    where = "on PATH or in KUBEBUILDER_ASSETS, as the recorded verdicts stand in for them"
    return f"no {', '.join(absent)} {where}" if absent else ""


def _program(name: str) -> str:
    return str(shutil.which(name, path=search_path()))


def _free_ports(count: int) -> list[int]:
    with_port = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in with_port]
    finally:
        for one in with_port:
            one.close()


@contextmanager
def served(folder: Path, ready_s: float = READY_S) -> Iterator[Path]:
    """Run both, and stop them at the end.

    Args:
        folder: for their files and logs
        ready_s: seconds until the server must answer

    Yields:
        a kubeconfig

    Raises:
        RuntimeError: one has ended, or the server does not answer; with its last lines
    """
    store, peer, port = _free_ports(3)
    key, tokens, config = (folder / name for name in ("key.pem", "tokens.csv", "kubeconfig"))
    subprocess.run([_program("openssl"), "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens.write_text(f'{TOKEN},tests,1,"system:masters"\n')
    config.write_text(json.dumps(_kubeconfig(port)))  # JSON is YAML
    listens = f"http://127.0.0.1:{store}"
    etcd = [f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={listens}", f"--advertise-client-urls={listens}"]
    etcd += [f"--listen-peer-urls=http://127.0.0.1:{peer}", "--unsafe-no-fsync"]
    server = [f"--etcd-servers={listens}", f"--cert-dir={folder / 'certificates'}", "--bind-address=127.0.0.1"]
    server += [f"--secure-port={port}", "--authorization-mode=RBAC", f"--token-auth-file={tokens}"]
    server += [f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}"]
    server += ["--service-account-issuer=https://127.0.0.1", "--service-cluster-ip-range=10.0.0.0/24"]
    server += ["--disable-admission-plugins=ServiceAccount"]  # no controller makes the accounts
    server += ["--allow-privileged=true"]  # as clusters have it: else the server itself refuses some of the manifests
    started: list[tuple[str, subprocess.Popen[bytes]]] = []
    try:
        for name, flags in (("etcd", etcd), ("kube-apiserver", server)):
            with (folder / f"{name}.log").open("wb") as log:
                command = [_program(name), *flags]
                process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
                started.append((name, process))
        _wait(started, folder, config, ready_s)
        yield config
    finally:
        for _, process in reversed(started):
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _kubeconfig(port: int) -> dict[str, object]:
    cluster = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": "tests", "user": {"token": TOKEN}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests", "namespace": "default"}}],
    }


def _wait(started: Sequence[tuple[str, subprocess.Popen[bytes]]], folder: Path, config: Path, ready_s: float) -> None:
    until = time.monotonic() + ready_s
    while True:
        for name, process in started:
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}: {_end(folder, name)}")
        asked = [_program("kubectl"), "--kubeconfig", str(config), "get", "--raw", "/readyz"]
        if subprocess.run(asked, capture_output=True, timeout=60, check=False).stdout.strip() == b"ok":
            return
        if time.monotonic() > until:
            raise RuntimeError(f"kube-apiserver is not ready after {ready_s} s: {_end(folder, 'kube-apiserver')}")
        time.sleep(0.2)


def _end(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text(errors="replace")[-2000:]
