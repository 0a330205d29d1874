"""A node for the scripted cluster: runs pods as processes, each in namespaces of its own. Needs root and iproute2.

A pod has a mount namespace (its claim and empty directories where it wants them, a read-only root, its own /etc/hosts
and termination log), a network namespace on a bridge, a host name, its user, no capabilities, and a grace period. What
it starts is an image's, in a root of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from image import Image
from kubelet import expanded
from scripted_cluster import ScriptedCluster, end

BRIDGE, NET = "bwbr0", "10.77.0"


def sh(text: str) -> None:
    subprocess.run(["sh", "-c", text], stderr=subprocess.DEVNULL, check=False)


def can_run() -> str:
    """Why this machine cannot be a node; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    if missing := [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]:
        return f"needs {', '.join(missing)}"
    trial = "mount --make-rprivate / && mount --bind / /mnt && mount -o remount,ro,bind /mnt"
    tried = subprocess.run(["unshare", "-m", "-n", "-u", "sh", "-c", trial], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "needs mount and network namespaces"


class Pod:
    """One pod's process."""

    def __init__(self, pod: dict[str, Any], folder: Path, number: int, image: Image) -> None:
        self.name, self.owner, self.ip = pod["metadata"]["name"], pod["owner"], f"{NET}.{number}"
        spec, metadata = pod["spec"], pod["metadata"]
        box, self.grace, self.killed = spec["containers"][0], spec["terminationGracePeriodSeconds"], 0.0
        index = metadata["annotations"]["batch.kubernetes.io/job-completion-index"]
        env = {each["name"]: expanded(each["value"], {}) for each in box["env"]} | {"JOB_COMPLETION_INDEX": index}
        head = env.get("MASTER_ADDR", "")
        self.host = head.replace("-node-0-0.", f"-node-0-{index}.") if "-node-0-0." in head else f"{self.owner}-{index}"
        self.folder = folder / self.name
        self.folder.mkdir(parents=True)
        user = spec["securityContext"]["runAsUser"]
        self.message, self.hosts, self.log = (self.folder / n for n in ("message", "hosts", "log"))
        self.message.touch()
        os.chown(self.message, user, user)
        self.net = f"bw{os.getpid() % 10_000}p{number}"
        sh(
            f"ip netns add {self.net}; ip link add v{number}bw type veth peer name eth0 netns {self.net};"
            f"ip link set v{number}bw master {BRIDGE} up; ip -n {self.net} addr add {self.ip}/24 dev eth0;"
            f"ip -n {self.net} link set eth0 up; ip -n {self.net} link set lo up"
        )
        self.link = f"v{number}bw"
        self.say_hosts([])
        claim = folder.parent / "claim"
        claim.mkdir(exist_ok=True)
        os.chown(claim, user, user)
        mount, root = box["volumeMounts"][0]["mountPath"], str(self.folder / "root")
        drop = f"setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs --bounding-set=-all"
        script = [
            "set -e; mount --make-rprivate /; ulimit -c 0",
            f"mkdir {root}; mount --bind {image.root} {root}; touch {root}/etc/hosts",
            f"mount --bind {self.hosts} {root}/etc/hosts",
            f"hostname {self.host.partition('.')[0]}",
            "touch /dev/termination-log 2>/dev/null || true; mount -t tmpfs -o mode=1777 shm /dev/shm",
            f"mount --bind {self.message} /dev/termination-log",
            f"mkdir -p {root}{mount}; mount --bind {claim} {root}{mount}",
            f"mount -o remount,ro,bind {root}",
            *(f"mount --rbind /{name} {root}/{name}" for name in ("dev", "proc", "sys")),
            f"mount -t tmpfs -o mode=1777 tmp {root}/tmp",
            f'exec chroot {root} env -C /tmp {drop} -- "$@"',
        ]
        enter = [
            "nsenter",
            f"--net=/run/netns/{self.net}",
            "unshare",
            "--mount",
            "--uts",
            "sh",
            "-c",
            "; ".join(script),
        ]
        with self.log.open("wb") as log:
            command = [*enter, "sh", *(expanded(word, env) for word in box["command"])]
            said: Any = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(command, env={**image.env, **env}, **said)

    def say_hosts(self, pods: list[Pod]) -> None:
        lines = [f"{p.ip} {p.host} {p.host.partition('.')[0]}" for p in {self, *pods}]  # as kubelet writes it
        self.hosts.write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after the grace period."""
        if not self.killed:
            self.killed = time.monotonic() + self.grace
            self.process.terminate()
        elif time.monotonic() > self.killed:
            self.kill()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def is_gone(self) -> bool:
        """Whether its processes have ended, those that outlive the first one killed: their peers must hear of it."""
        if self.process.poll() is None:
            return False
        try:
            self.kill()
        except ProcessLookupError:
            return True
        return False

    def clean(self) -> None:
        sh(f"ip netns del {self.net}; ip link del {self.link}")


class Node:
    """A thread that runs the pods of a cluster in an image."""

    def __init__(self, cluster: ScriptedCluster, folder: Path, image: Image) -> None:
        self.image = image
        self.cluster, self.folder, self.pods, self.made = cluster, folder / "pods", {}, 1
        with cluster.open() as state:
            state["alive"] = []
        sh(f"ip link add {BRIDGE} type bridge; ip addr add {NET}.254/24 dev {BRIDGE}; ip link set {BRIDGE} up")
        self.ended: list[str] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def pod_of(self, owner: str, index: int = 0) -> Pod | None:
        """The running pod of a job."""
        found = [p for n, p in self.pods.items() if p.owner == owner and n.startswith(f"{owner}-{index}-")]
        return found[0] if found else None

    def disturb(self, pod: Pod, how: str) -> None:
        """``kill``: SIGKILL; ``evict``: as a drain does; ``delete``: as kubectl does."""
        if how == "kill":
            pod.kill()
            return
        if how == "evict":
            with self.cluster.open() as state:
                condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
                state["objects"][f"Pod/{pod.name}"]["status"]["conditions"] = [condition]
        pod.stop()

    def close(self) -> None:
        self.done.set()
        self.thread.join(timeout=30)
        for pod in self.pods.values():
            with contextlib.suppress(ProcessLookupError):
                pod.kill()
            pod.clean()
        sh(f"ip link del {BRIDGE}; rmdir /runs; rm -f /dev/termination-log")

    def _work(self) -> None:
        while not self.done.wait(0.2):
            with self.cluster.open() as state:
                self._moment(state)

    def _moment(self, state: dict[str, Any]) -> None:
        listed = {o["metadata"]["name"]: o for o in state["objects"].values() if o["kind"] == "Pod"}
        for name, one in listed.items():
            if one["status"]["phase"] == "Pending" and name not in self.pods:
                self.made += 1
                self.pods[name] = Pod(one, self.folder, self.made, self.image)
                one["status"] |= {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
        for pod in self.pods.values():
            pod.say_hosts([p for p in self.pods.values() if p.owner == pod.owner])
            if pod.name not in listed or pod.killed:
                pod.stop()
        for name in [n for n, p in self.pods.items() if p.is_gone()]:
            pod = self.pods.pop(name)
            pod.clean()
            code = pod.process.returncode
            code = code if code >= 0 else 128 - code
            self.ended.append(f"{name} {code}")
            if name in listed:
                kept = listed[name]["status"].get("conditions")
                text = pod.message.read_text() or (pod.log.read_text(errors="replace")[-2048:] if code else "")
                end(listed[name], code, text)
                if kept:
                    listed[name]["status"]["conditions"] = kept
        state["alive"] = [p.owner for p in self.pods.values()]
