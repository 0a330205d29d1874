"""Options → the Kubernetes objects of one job, as plain dictionaries. Pure.

One container a node, whose main process is this project's: torchrun in its place would turn every exit code into 1,
and kill its workers 30 s after SIGTERM. Lightning starts the ranks of a node.

| exit code | Indexed Job | JobSet: rule of the job inside → of the set |
|---|---|---|
| 64 refused, 70 diverged | FailJob | FailJob → FailJobSet |
| 75 stopped, state saved | Ignore | FailJob → RestartJobSetAndIgnoreMaxRestarts |
| eviction, preemption, drain | Ignore | FailJob → the same |
| others | count against ``restarts`` | fail the job → RestartJobSet, which counts |

A JobSet restarts as a whole: a pod that came back alone would leave its peers waiting in a collective.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from blockwright.plugins.kubernetes.options import GROUP, Options
from blockwright.registry.errors import REFUSED
from blockwright.training.result import DIVERGED, PREEMPTED

Manifest = dict[str, Any]
FINAL = [REFUSED, DIVERGED]
CONTAINER = "train"
PORT = "29500"  # where ranks find each other
USER = 1000
GRACE_S = 120  # while no save has been measured
ENTRY = ["python", "-m", "blockwright.plugins.kubernetes.pod"]
QUEUE = "kueue.x-k8s.io/queue-name"
TEMPORARY = ("HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")  # the root is read-only


def label(text: str, limit: int) -> str:
    """A DNS label from any name; a shortened one ends in a digest, so that two names stay two."""
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"
    found = found if found[0].isalpha() else f"r{found}"
    if len(found) > limit:
        found = f"{found[: limit - 7].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return found


def name_of(task: str, sweep: str, number: int) -> str:
    """The stable name of a job: created again, it is found to exist."""
    return f"{label(task, 30)}-{sweep}-{number}"


def render(
    options: Options,
    task: str,
    sweep: str,
    number: int,
    folder: str,
    overrides: Sequence[str],
    start: Sequence[str] = (),
) -> list[Manifest]:
    """The objects of one job, in the order in which they are created: the job, and what it owns.

    Args:
        options: as checked by ``blockwright.plugins.kubernetes.wanted.check_options``
        task: ``task_name``, for people
        sweep: eight letters that name the sweep
        number: of the job in its sweep
        folder: of the sweep, on the claim
        overrides: of the job
        start: options of the pod's command that give the job it starts from

    Returns:
        manifests
    """
    name, kind = name_of(task, sweep, number), options.made_as
    own = {"app.kubernetes.io/managed-by": "blockwright", f"{GROUP}/sweep": sweep, f"{GROUP}/job": str(number)}
    labels = {**options.labels, **own}
    queued = {QUEUE: options.queue} if options.queue else {}
    if options.queue and options.priority:
        queued["kueue.x-k8s.io/priority-class"] = options.priority
    metadata = {"name": name, "labels": {**labels, **queued}}
    command = [*ENTRY, *start, folder, str(number), "--", *overrides]
    if kind == "trainjob":
        return [_trainjob(options, metadata, labels, command)]
    head = f"{name}-node-0-0.{name}" if kind == "jobset" else f"{name}-0.{name}"
    job = job_spec(options, kind, labels, pod(options, head, command))
    if kind == "jobset":
        return [
            {
                "apiVersion": "jobset.x-k8s.io/v1alpha2",
                "kind": "JobSet",
                "metadata": metadata,
                "spec": _set(options, job),
            }
        ]
    if options.ttl_s is not None:
        job["ttlSecondsAfterFinished"] = options.ttl_s
    objects: list[Manifest] = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job}]
    if options.nodes > 1:
        job["template"]["spec"]["subdomain"] = name
        objects.append(_service(name, labels))
    return objects


def inner_job(manifest: Manifest) -> Manifest | None:
    """The Job inside a JobSet, which neither its definition nor its webhook looks into; None for other objects."""
    if manifest["kind"] != "JobSet":
        return None
    inside = manifest["spec"]["replicatedJobs"][0]
    metadata = {
        "name": f"{manifest['metadata']['name']}-{inside['name']}-0",
        "labels": manifest["metadata"].get("labels", {}),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": inside["template"]["spec"]}


def job_spec(options: Options, kind: str, labels: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    """The ``spec`` of an Indexed Job of ``options.nodes`` pods."""
    annotations = dict(options.annotations)
    if options.topology:
        annotations["kueue.x-k8s.io/podset-required-topology"] = options.topology
    metadata: dict[str, Any] = {"labels": labels, **({"annotations": annotations} if annotations else {})}
    if options.queue and options.priority:
        spec.pop("priorityClassName", None)
    return {
        "completionMode": "Indexed",
        "completions": options.nodes,
        "parallelism": options.nodes,
        "backoffLimit": options.restarts if kind == "job" else 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": pod_rules(kind)},
        "template": {"metadata": metadata, "spec": spec},
    }


def pod_rules(kind: str, container: str = CONTAINER) -> list[dict[str, Any]]:
    """The failure policy of a Job; alone, or in a set, which reads in its message which rule failed it."""
    stopped = "Ignore" if kind == "job" else "FailJob"
    return [
        {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": FINAL}},
        {"action": stopped, "onExitCodes": {"containerName": container, "operator": "In", "values": [PREEMPTED]}},
        {"action": stopped, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def set_policy(restarts: int) -> dict[str, Any]:
    """The failure policy of a JobSet."""
    reason, final = ["PodFailurePolicy"], f"exit code ({'|'.join(map(str, FINAL))}) "
    stopped = [f"exit code {PREEMPTED} ", "has condition DisruptionTarget "]
    return {
        "maxRestarts": restarts,
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": "final",
                "action": "FailJobSet",
                "onJobFailureReasons": reason,
                "onJobFailureMessagePatterns": [final],
            },
            {
                "name": "stopped",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": reason,
                "onJobFailureMessagePatterns": stopped,
            },
        ],
    }


def _set(options: Options, job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": set_policy(options.restarts),
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    }
    if options.ttl_s is not None:
        spec["ttlSecondsAfterFinished"] = options.ttl_s
    return spec


def _service(name: str, labels: dict[str, str]) -> Manifest:
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"batch.kubernetes.io/job-name": name}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels}, "spec": spec}


def pod(options: Options, head: str, command: Sequence[str]) -> dict[str, Any]:
    """The pod of a node, as the pod security level ``restricted`` allows it.

    Args:
        options: of the job
        head: host name of the first node
        command: of the container
    """
    mounts, volumes = _storage(options)
    limits = options.limits()
    security: dict[str, Any] = {"drop": ["ALL"], **({"add": options.capabilities} if options.capabilities else {})}
    container = {
        "name": CONTAINER,
        "image": options.image,
        "command": [as_written(word) for word in command],
        "env": environment(options, head),
        "envFrom": [{"secretRef": {"name": secret}} for secret in options.secrets],
        "resources": {"limits": limits, "requests": dict(limits)},
        "volumeMounts": mounts,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": security,
        },
    }
    user = {"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"}
    found = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_s or GRACE_S,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}},
        "nodeSelector": dict(options.node_selector),
        "tolerations": list(options.tolerations),
        "imagePullSecrets": [{"name": secret} for secret in options.pull_secrets],
        "containers": [container],
        "volumes": volumes,
        **({"priorityClassName": options.priority} if options.priority and not options.queue else {}),
    }
    return {key: value for key, value in found.items() if value not in ({}, [])}


def environment(options: Options, head: str) -> list[dict[str, str]]:
    """Variables of the container: the nodes, and folders that can be written."""
    given = dict.fromkeys(TEMPORARY, "/tmp")
    given |= {"PYTHONUNBUFFERED": "1", "NNODES": str(options.nodes), "PROJECT_ROOT": options.mount}
    if options.nodes > 1:
        given |= {"MASTER_ADDR": head, "MASTER_PORT": PORT}
    return [{"name": name, "value": as_written(str(value))} for name, value in {**given, **options.env}.items()]


def as_written(text: str) -> str:
    """A text that reaches the container as it is: the kubelet replaces $(NAME) by a variable's value, and $$ by $."""
    return text.replace("$", "$$")


def _storage(options: Options) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    claims = {options.claim: options.mount, **options.volumes}
    mounts = [{"name": f"claim-{i}", "mountPath": path} for i, path in enumerate(claims.values())]
    volumes: list[dict[str, Any]] = []
    for i, claim in enumerate(claims):
        volumes.append({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}})
    memory = {"medium": "Memory", **({"sizeLimit": options.shm} if options.shm else {})}
    for name, path, source in (("tmp", "/tmp", {}), ("shm", "/dev/shm", memory)):
        volumes.append({"name": name, "emptyDir": source})
        mounts.append({"name": name, "mountPath": path})
    return mounts, volumes


def _trainjob(options: Options, metadata: dict[str, Any], labels: dict[str, str], command: list[str]) -> Manifest:
    """A TrainJob of deploy/kubernetes/runtime.yaml, which has the failure policies: a TrainJob cannot have its own."""
    name = metadata["name"]
    whole = pod(options, f"{name}-node-0-0.{name}", command)
    (container,) = whole.pop("containers")
    allowed = ("nodeSelector", "tolerations", "imagePullSecrets", "terminationGracePeriodSeconds", "volumes")
    spec: dict[str, Any] = {key: whole[key] for key in allowed if key in whole}
    spec["containers"] = [{"name": "node", "volumeMounts": container["volumeMounts"]}]
    template = {"metadata": job_spec(options, "jobset", labels, {})["template"]["metadata"], "spec": spec}
    inside = {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": template}}}]}
    trainer = {
        "image": container["image"],
        "command": container["command"],
        "env": container["env"],
        "numNodes": options.nodes,
        "resourcesPerNode": container["resources"],
    }
    patch = {"manager": "blockwright.dev/launcher", "trainingRuntimeSpec": {"template": {"spec": inside}}}
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": options.runtime}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {"runtimeRef": reference, "trainer": trainer, "runtimePatches": [patch]},
    }


def runtime(name: str = "blockwright", restarts: int = 6) -> Manifest:
    """The ClusterTrainingRuntime of deploy/kubernetes/runtime.yaml: failure policies and security for TrainJobs.

    Its policy of machine learning is only a number of nodes: torch's would make it one of torchrun's.
    """
    options = Options(image="blockwright", shm=None)
    whole = pod(options, "", [])
    (container,) = whole.pop("containers")
    node = {key: container[key] for key in ("image", "terminationMessagePolicy", "securityContext")}
    spec = {key: value for key, value in whole.items() if key != "volumes"}
    job = job_spec(options, "jobset", {}, {**spec, "containers": [{"name": "node", **node}]})
    job["podFailurePolicy"] = {"rules": pod_rules("jobset", "node")}
    job["template"].pop("metadata")
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    inside = {"name": "node", "template": {"metadata": step, "spec": job}}
    spec = {
        "network": {"publishNotReadyAddresses": True},
        "failurePolicy": set_policy(restarts),
        "replicatedJobs": [inside],
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": name},
        "spec": {"mlPolicy": {"numNodes": 1}, "template": {"spec": spec}},
    }
