"""The options of ``hydra/launcher=kubernetes``. Hydra reads them at every start, so this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

GROUP = "blockwright.dev"  # prefix of labels
Count = Annotated[int, Ge(1)]
Int32 = Annotated[int, Ge(0), Le(2**31 - 1)]  # as a server stores it


@dataclass
class Options:
    """What a job gets on a cluster; one vocabulary with ``trainer`` and ``blockwright.lab.sweep``.

    Args:
        image: with this project and its dependencies, best by digest
        namespace: null for that of the context
        context: of kubectl's configuration; null for the current one
        kind: ``job`` (Indexed Job, plus a headless Service for several nodes), ``jobset``, ``trainjob``, or ``auto``:
            a job for one node, a JobSet for several
        runtime: name of the ClusterTrainingRuntime that a TrainJob refers to
        nodes: machines of a job, one pod on each
        gpus: of a node
        gpu: resource that a GPU is requested as
        cpu: of a node, as Kubernetes writes quantities: 4, 500m
        memory: of a node: 64Gi
        resources: more of a node, as ``rdma/ib: "1"``
        shm: size of the memory-backed /dev/shm, which counts as memory; null for no limit
        claim: PersistentVolumeClaim for the runs, ReadWriteMany for several nodes
        mount: where the claim is mounted
        volumes: further claims → where each is mounted
        env: further variables, none secret
        secrets: names of Secrets whose keys become variables
        pull_secrets: names of Secrets for the image's registry
        node_selector: labels that a node must have
        tolerations: of taints, as in a pod
        labels: of all objects of a job, for people and policies
        annotations: of the pods
        capabilities: of the container, as IPC_LOCK; the pod security level ``restricted`` allows none
        queue: Kueue's LocalQueue
        priority: Kueue's WorkloadPriorityClass with a queue, else a PriorityClass
        topology: node label that all pods of a job must share, for Kueue
        grace_s: seconds from SIGTERM to SIGKILL; null for three times the slowest save of the sweep's ended jobs, 60 at
            least, and 120 before any has ended
        restarts: failed attempts that are tried again; stops on request do not count
        start_deadline_s: seconds after which a pod that cannot start is given up
        ttl_s: seconds after which an ended job is deleted from the cluster; null for never. The launcher must have
            looked at it before, so a minute at least
        parallel: jobs at a time
        on_stop: when the launcher is stopped: ``leave`` the jobs running, or ``stop`` them
        render: folder for the manifests; nothing is run
    """

    _target_: str = "hydra_plugins.blockwright_kubernetes.launcher.KubernetesLauncher"
    image: str | None = None
    namespace: str | None = None
    context: str | None = None
    kind: str = "auto"
    runtime: str = "blockwright"
    nodes: Count = 1
    gpus: Annotated[int, Ge(0)] = 0
    gpu: str = "nvidia.com/gpu"
    cpu: str | None = None
    memory: str | None = None
    resources: dict[str, str] = field(default_factory=dict)
    shm: str | None = "8Gi"
    claim: str = "runs"
    mount: str = "/runs"
    volumes: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    pull_secrets: list[str] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Any] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    capabilities: list[str] = field(default_factory=list)
    queue: str | None = None
    priority: str | None = None
    topology: str | None = None
    grace_s: Annotated[int, Ge(10)] | None = None
    restarts: Int32 = 6
    start_deadline_s: Count = 1800
    ttl_s: Annotated[int, Ge(60), Le(2**31 - 1)] | None = None
    parallel: Count = 8
    on_stop: str = "leave"
    render: str | None = None

    @property
    def made_as(self) -> str:
        """``job``, ``jobset`` or ``trainjob``."""
        return self.kind if self.kind != "auto" else "jobset" if self.nodes > 1 else "job"

    def limits(self) -> dict[str, str]:
        """Resources of a node."""
        asked = {"cpu": self.cpu, "memory": self.memory, self.gpu: str(self.gpus) if self.gpus else None}
        return {name: str(value) for name, value in {**asked, **self.resources}.items() if value}
