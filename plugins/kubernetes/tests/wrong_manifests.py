"""Sixty manifests with one mistake each, and three good ones; verdicts.json has what an API server 1.36 said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.render import render

IMAGE = "registry.example/blockwright@sha256:" + "0" * 64
Manifest = dict[str, Any]


def good(**options: Any) -> list[Manifest]:
    given = Options(**{"image": IMAGE, "cpu": "1", "memory": "16Gi", **options})
    return render(given, "train", "0a1b2c3d", 3, "/runs/0a1b2c3d", ["seed=1"])


def job(change: Callable[[Manifest], Any], **options: Any) -> Manifest:
    one = copy.deepcopy(good(kind="job", **options)[-1])
    change(one)
    return one


def spec(change: Callable[[Manifest], Any]) -> Manifest:
    return job(lambda j: change(j["spec"]))


def pod(change: Callable[[Manifest], Any]) -> Manifest:
    return job(lambda j: change(j["spec"]["template"]["spec"]))


def box(change: Callable[[Manifest], Any]) -> Manifest:
    return job(lambda j: change(j["spec"]["template"]["spec"]["containers"][0]))


def rule(change: Callable[[Manifest], Any]) -> Manifest:
    return spec(lambda s: change(s["podFailurePolicy"]["rules"][0]))


def jobset(change: Callable[[Manifest], Any]) -> Manifest:
    one = copy.deepcopy(good(nodes=2)[0])
    change(one["spec"])
    return one


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "good job": lambda: job(lambda j: None),
    "good service": lambda: good(kind="job", nodes=2)[0],
    "good jobset": lambda: good(nodes=2)[0],
    "key misspelt (backofLimit)": lambda: spec(lambda s: s.update(backofLimit=3)),
    "number as text (parallelism)": lambda: spec(lambda s: s.update(parallelism="2")),
    "no image": lambda: box(lambda c: c.pop("image")),
    "no containers": lambda: pod(lambda p: p.pop("containers")),
    "two containers of one name": lambda: pod(lambda p: p["containers"].append(p["containers"][0])),
    "name with capitals": lambda: job(lambda j: j["metadata"].update(name="Train_1")),
    "name of 64 letters": lambda: job(lambda j: j["metadata"].update(name="a" * 64)),
    "name of 60 letters, indexed": lambda: job(lambda j: j["metadata"].update(name="a" * 62)),
    "label with a space": lambda: job(lambda j: j["metadata"]["labels"].update({"blockwright.dev/job": "a b"})),
    "label of 64 letters": lambda: job(lambda j: j["metadata"]["labels"].update({"blockwright.dev/job": "a" * 64})),
    "annotations of 300 KiB": lambda: job(lambda j: j["metadata"].update(annotations={"a": "x" * 300_000})),
    "restartPolicy Always": lambda: pod(lambda p: p.update(restartPolicy="Always")),
    "no restartPolicy": lambda: pod(lambda p: p.pop("restartPolicy")),
    "OnFailure with podFailurePolicy": lambda: pod(lambda p: p.update(restartPolicy="OnFailure")),
    "replace terminating, with podFailurePolicy": lambda: spec(
        lambda s: s.update(podReplacementPolicy="TerminatingOrFailed")
    ),
    "exit codes unordered": lambda: rule(lambda r: r["onExitCodes"].update(values=[70, 64])),
    "exit code twice": lambda: rule(lambda r: r["onExitCodes"].update(values=[64, 64])),
    "exit code 0 In": lambda: rule(lambda r: r["onExitCodes"].update(values=[0])),
    "container of a rule unknown": lambda: rule(lambda r: r["onExitCodes"].update(containerName="trainer")),
    "rule with both": lambda: rule(
        lambda r: r.update(onPodConditions=[{"type": "DisruptionTarget", "status": "True"}])
    ),
    "action unknown": lambda: rule(lambda r: r.update(action="Restart")),
    "FailIndex without backoffLimitPerIndex": lambda: rule(lambda r: r.update(action="FailIndex")),
    "condition without status": lambda: spec(
        lambda s: s["podFailurePolicy"]["rules"][2]["onPodConditions"][0].pop("status")
    ),
    "indexed without completions": lambda: spec(lambda s: s.pop("completions")),
    "maxFailedIndexes alone": lambda: spec(lambda s: s.update(maxFailedIndexes=1)),
    "successPolicy, not indexed": lambda: spec(
        lambda s: s.update(completionMode="NonIndexed", successPolicy={"rules": [{"succeededCount": 1}]})
    ),
    "negative backoffLimit": lambda: spec(lambda s: s.update(backoffLimit=-1)),
    "negative grace period": lambda: pod(lambda p: p.update(terminationGracePeriodSeconds=-5)),
    "gpu requests ≠ limits": lambda: box(
        lambda c: c.update(resources={"limits": {"nvidia.com/gpu": "8"}, "requests": {"nvidia.com/gpu": "4"}})
    ),
    "gpu requests only": lambda: box(lambda c: c.update(resources={"requests": {"nvidia.com/gpu": "4"}})),
    "half a gpu": lambda: box(lambda c: c.update(resources={"limits": {"nvidia.com/gpu": "500m"}})),
    "memory '16GB'": lambda: box(lambda c: c.update(resources={"limits": {"memory": "16GB"}})),
    "requests above limits": lambda: box(
        lambda c: c.update(resources={"limits": {"cpu": "1"}, "requests": {"cpu": "2"}})
    ),
    "unknown resource 'gpu'": lambda: box(lambda c: c.update(resources={"limits": {"gpu": "1"}})),
    "mount of no volume": lambda: box(lambda c: c["volumeMounts"].append({"name": "nowhere", "mountPath": "/x"})),
    "two mounts at one path": lambda: box(lambda c: c["volumeMounts"].append({"name": "tmp", "mountPath": "/runs"})),
    "volume name with _": lambda: pod(lambda p: p["volumes"].append({"name": "a_b", "emptyDir": {}})),
    "env name with a space": lambda: box(lambda c: c["env"].append({"name": "A B", "value": "1"})),
    "env value a number": lambda: box(lambda c: c["env"].append({"name": "A", "value": 1})),
    "toleration Equal without value and Exists with": lambda: pod(
        lambda p: p.update(tolerations=[{"key": "a", "operator": "Exists", "value": "x"}])
    ),
    "toleration effect unknown": lambda: pod(
        lambda p: p.update(tolerations=[{"key": "a", "operator": "Exists", "effect": "NoRun"}])
    ),
    "mountPath relative with :": lambda: box(lambda c: c["volumeMounts"][0].update(mountPath="a:b")),
    "sizeLimit negative": lambda: pod(lambda p: p["volumes"][-1]["emptyDir"].update(sizeLimit="-1Gi")),
    "runAsNonRoot with user 0": lambda: pod(lambda p: p["securityContext"].update(runAsUser=0)),
    "seccomp unknown": lambda: pod(lambda p: p["securityContext"].update(seccompProfile={"type": "Default"})),
    "priorityClass not there": lambda: pod(lambda p: p.update(priorityClassName="nope")),
    "privileged (restricted namespace)": lambda: box(
        lambda c: c["securityContext"].update(privileged=True, allowPrivilegeEscalation=True)
    ),
    "hostPath (restricted namespace)": lambda: pod(
        lambda p: p["volumes"].append({"name": "h", "hostPath": {"path": "/"}})
    ),
    "service: port without number": lambda: {
        **good(kind="job", nodes=2)[0],
        "spec": {"clusterIP": "None", "selector": {}, "ports": [{"name": "c10d"}]},
    },
    "jobset: key misspelt (maxRestart)": lambda: jobset(lambda s: s["failurePolicy"].update(maxRestart=3)),
    "jobset: action unknown": lambda: jobset(lambda s: s["failurePolicy"]["rules"][0].update(action="Restart")),
    "jobset: rule without name": lambda: jobset(lambda s: s["failurePolicy"]["rules"][0].pop("name")),
    "jobset: replicas negative": lambda: jobset(lambda s: s["replicatedJobs"][0].update(replicas=-1)),
    "jobset: restartStrategy unknown": lambda: jobset(lambda s: s["failurePolicy"].update(restartStrategy="All")),
    "jobset: two of one name": lambda: jobset(lambda s: s["replicatedJobs"].append(s["replicatedJobs"][0])),
    "jobset: InOrder and dependsOn": lambda: jobset(
        lambda s: (
            s.update(startupPolicy={"startupPolicyOrder": "InOrder"}),
            s["replicatedJobs"].append(
                {**s["replicatedJobs"][0], "name": "b", "dependsOn": [{"name": "node", "status": "Ready"}]}
            ),
        )
    ),
    "jobset: container of a rule unknown (the Job inside)": lambda: jobset(
        lambda s: s["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(
            containerName="x"
        )
    ),
    "jobset: name too long for its pods (webhook)": lambda: {**jobset(lambda s: None), "metadata": {"name": "a" * 55}},
    "jobset: regular expression wrong (webhook?)": lambda: jobset(
        lambda s: s["failurePolicy"]["rules"][0].update(onJobFailureMessagePatterns=["("])
    ),
    "jobset: reason unknown (webhook)": lambda: jobset(
        lambda s: s["failurePolicy"]["rules"][0].update(onJobFailureReasons=["Bad"])
    ),
}
