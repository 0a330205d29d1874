"""Sixty manifests with one mistake each, and three good ones; verdicts.json has what an API server 1.36 said."""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any

from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.render import render

IMAGE = "registry.example/blockwright@sha256:" + "0" * 64
Manifest = dict[str, Any]
LEFT_OUT = object()
JOB, SPEC, SERVICE, SET = ("job",), ("job", "spec"), ("service", "spec"), ("jobset", "spec")
TEMPLATE = (*SPEC, "template", "spec")
BOX = (*TEMPLATE, "containers", 0)
RULES = (*SPEC, "podFailurePolicy", "rules")
RULE, CODES = (*RULES, 0), (*RULES, 0, "onExitCodes")
POLICY = (*SET, "failurePolicy")
SET_RULE, IN_SET = (*POLICY, "rules", 0), (*SET, "replicatedJobs", 0)
IN_SET_CODES = (*IN_SET, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCodes")
PRIVILEGED = {"privileged": True, "allowPrivilegeEscalation": True}
AFTER = {"name": "b", "dependsOn": [{"name": "node", "status": "Ready"}]}


def good(**options: Any) -> list[Manifest]:
    given = Options(**{"image": IMAGE, "cpu": "1", "memory": "16Gi", **options})
    return render(given, "train", "0a1b2c3d", 3, "/runs/0a1b2c3d", ["seed=1"])


def limits(**requests: Any) -> dict[str, Any]:
    return {"resources": requests}


# Where, what is written or left out there (into a list: added), and a part of the path, value or rule that is found.
WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "key misspelt (backofLimit)": (SPEC, {"backofLimit": 3}, "backofLimit"),
    "number as text (parallelism)": (SPEC, {"parallelism": "2"}, "parallelism"),
    "no image": (BOX, {"image": LEFT_OUT}, "containers[0].image"),
    "no containers": (TEMPLATE, {"containers": LEFT_OUT}, "containerName"),
    "two containers of one name": ((*TEMPLATE, "containers"), {"name": "train", "image": IMAGE}, "2 containers"),
    "name with capitals": ((*JOB, "metadata"), {"name": "Train_1"}, "metadata.name"),
    "name of 64 letters": ((*JOB, "metadata"), {"name": "a" * 64}, "metadata.name"),
    "name of 60 letters, indexed": ((*JOB, "metadata"), {"name": "a" * 62}, "with an index"),
    "label with a space": ((*JOB, "metadata", "labels"), {"blockwright.dev/job": "a b"}, "blockwright.dev/job"),
    "label of 64 letters": ((*JOB, "metadata", "labels"), {"blockwright.dev/job": "a" * 64}, "blockwright.dev/job"),
    "annotations of 300 KiB": ((*JOB, "metadata"), {"annotations": {"a": "x" * 300_000}}, "262,144"),
    "restartPolicy Always": (TEMPLATE, {"restartPolicy": "Always"}, "restartPolicy"),
    "no restartPolicy": (TEMPLATE, {"restartPolicy": LEFT_OUT}, "restartPolicy"),
    "OnFailure with podFailurePolicy": (TEMPLATE, {"restartPolicy": "OnFailure"}, "OnFailure"),
    "replace terminating, with podFailurePolicy": (
        SPEC,
        {"podReplacementPolicy": "TerminatingOrFailed"},
        "TerminatingOrFailed",
    ),
    "exit codes unordered": (CODES, {"values": [70, 64]}, "[64, 70]"),
    "exit code twice": (CODES, {"values": [64, 64]}, "[64]"),
    "exit code 0 In": (CODES, {"values": [0]}, "0"),
    "container of a rule unknown": (CODES, {"containerName": "trainer"}, "trainer"),
    "rule with both": (RULE, {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}, "onPodConditions"),
    "action unknown": (RULE, {"action": "Restart"}, "Restart"),
    "FailIndex without backoffLimitPerIndex": (RULE, {"action": "FailIndex"}, "backoffLimitPerIndex"),
    "condition without status": ((*RULES, 2, "onPodConditions", 0), {"status": LEFT_OUT}, "status"),
    "indexed without completions": (SPEC, {"completions": LEFT_OUT}, "completions"),
    "maxFailedIndexes alone": (SPEC, {"maxFailedIndexes": 1}, "backoffLimitPerIndex"),
    "successPolicy, not indexed": (
        SPEC,
        {"completionMode": "NonIndexed", "successPolicy": {"rules": [{"succeededCount": 1}]}},
        "successPolicy",
    ),
    "negative backoffLimit": (SPEC, {"backoffLimit": -1}, "-1"),
    "negative grace period": (TEMPLATE, {"terminationGracePeriodSeconds": -5}, "-5"),
    "gpu requests ≠ limits": (
        BOX,
        limits(limits={"nvidia.com/gpu": "8"}, requests={"nvidia.com/gpu": "4"}),
        "limit of 8",
    ),
    "gpu requests only": (BOX, limits(requests={"nvidia.com/gpu": "4"}), "nvidia.com/gpu"),
    "half a gpu": (BOX, limits(limits={"nvidia.com/gpu": "500m"}), "whole numbers"),
    "memory '16GB'": (BOX, limits(limits={"memory": "16GB"}), "16GB"),
    "requests above limits": (BOX, limits(limits={"cpu": "1"}, requests={"cpu": "2"}), "above the limit"),
    "unknown resource 'gpu'": (BOX, limits(limits={"gpu": "1"}), "full name"),
    "mount of no volume": ((*BOX, "volumeMounts"), {"name": "nowhere", "mountPath": "/x"}, "nowhere"),
    "two mounts at one path": ((*BOX, "volumeMounts"), {"name": "tmp", "mountPath": "/runs"}, "/runs"),
    "volume name with _": ((*TEMPLATE, "volumes"), {"name": "a_b", "emptyDir": {}}, "a_b"),
    "env name with a space": ((*BOX, "env"), {"name": "A B", "value": "1"}, "A B"),
    "env value a number": ((*BOX, "env"), {"name": "A", "value": 1}, "env["),
    "toleration Equal without value and Exists with": (
        TEMPLATE,
        {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]},
        "Exists",
    ),
    "toleration effect unknown": (
        TEMPLATE,
        {"tolerations": [{"key": "a", "operator": "Exists", "effect": "NoRun"}]},
        "NoRun",
    ),
    "mountPath relative with :": ((*BOX, "volumeMounts", 0), {"mountPath": "a:b"}, "a:b"),
    "sizeLimit negative": ((*TEMPLATE, "volumes", -1, "emptyDir"), {"sizeLimit": "-1Gi"}, "-1Gi"),
    "runAsNonRoot with user 0": ((*TEMPLATE, "securityContext"), {"runAsUser": 0}, "root"),
    "seccomp unknown": ((*TEMPLATE, "securityContext"), {"seccompProfile": {"type": "Default"}}, "Default"),
    "priorityClass not there": (TEMPLATE, {"priorityClassName": "nope"}, "asked of the cluster"),
    "privileged (restricted namespace)": ((*BOX, "securityContext"), PRIVILEGED, "privileged"),
    "hostPath (restricted namespace)": ((*TEMPLATE, "volumes"), {"name": "h", "hostPath": {"path": "/"}}, "hostPath"),
    "service: port without number": (SERVICE, {"selector": {}, "ports": [{"name": "c10d"}]}, "port"),
    "jobset: key misspelt (maxRestart)": (POLICY, {"maxRestart": 3}, "maxRestart"),
    "jobset: action unknown": (SET_RULE, {"action": "Restart"}, "Restart"),
    "jobset: rule without name": (SET_RULE, {"name": LEFT_OUT}, "name"),
    "jobset: replicas negative": (IN_SET, {"replicas": -1}, "-1"),
    "jobset: restartStrategy unknown": (POLICY, {"restartStrategy": "All"}, "All"),
    "jobset: two of one name": ((*SET, "replicatedJobs"), {}, "node"),
    "jobset: InOrder and dependsOn": ((*SET, "replicatedJobs"), AFTER, "dependsOn"),
    "jobset: container of a rule unknown (the Job inside)": (IN_SET_CODES, {"containerName": "x"}, "containerName"),
    "jobset: name too long for its pods (webhook)": (("jobset", "metadata"), {"name": "a" * 55}, "pods"),
    "jobset: regular expression wrong (webhook?)": (SET_RULE, {"onJobFailureMessagePatterns": ["("]}, "regular"),
    "jobset: reason unknown (webhook)": (SET_RULE, {"onJobFailureReasons": ["Bad"]}, "Bad"),
}
GOOD = {f"good {name}": name for name in ("job", "service", "jobset")}


def manifest(case: str) -> Manifest:
    """The manifest of a case."""
    (name, *path), change, _ = WRONG.get(case, ((GOOD.get(case),), {}, ""))
    options = {"job": {"kind": "job"}, "service": {"kind": "job", "nodes": 2}, "jobset": {"nodes": 2}}[name]
    one = copy.deepcopy(good(**options)[1 if name == "service" else 0])
    at = reduce(lambda inner, key: inner[key], path, one)
    if isinstance(at, list):
        at.append({**at[0], **change} if path[-1] == "replicatedJobs" else change)
    else:
        at.update(change)
        for key in [key for key, value in at.items() if value is LEFT_OUT]:
            del at[key]
    if case == "jobset: InOrder and dependsOn":
        one["spec"]["startupPolicy"] = {"startupPolicyOrder": "InOrder"}
    return one
