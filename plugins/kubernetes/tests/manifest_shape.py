"""The fields of the Kubernetes objects that the launcher renders, with their types: what a strict server decodes.

A field that is not listed is refused, as `kubectl create --validate=strict` refuses one that does not exist. Fields
that exist but are never rendered are left out, but for those that a wrong manifest is likely to have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from blockwright.plugins.kubernetes.syntax import QUANTITY
from blockwright.registry import ConfigError, did_you_mean

Words = dict[str, type]
words: Words = {"*": str}
names = [{"name": str}]

METADATA = {"name": str, "namespace": str, "labels": words, "annotations": words}
CONTAINER = {
    "name": str,
    "image": str,
    "imagePullPolicy": str,
    "command": [str],
    "args": [str],
    "workingDir": str,
    "env": [{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str}}}],
    "envFrom": [{"secretRef": {"name": str}}],
    "resources": {"limits": {"*": "quantity"}, "requests": {"*": "quantity"}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
    "terminationMessagePolicy": str,
    "securityContext": {
        "allowPrivilegeEscalation": bool,
        "readOnlyRootFilesystem": bool,
        "privileged": bool,
        "capabilities": {"drop": [str], "add": [str]},
    },
}
VOLUME = {
    "name": str,
    "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
    "emptyDir": {"medium": str, "sizeLimit": "quantity"},
    "hostPath": {"path": str, "type": str},
    "secret": {"secretName": str},
    "configMap": {"name": str},
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "automountServiceAccountToken": bool,
    "enableServiceLinks": bool,
    "hostname": str,
    "subdomain": str,
    "priorityClassName": str,
    "serviceAccountName": str,
    "nodeSelector": words,
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}],
    "imagePullSecrets": names,
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "fsGroup": int,
        "fsGroupChangePolicy": str,
        "seccompProfile": {"type": str, "localhostProfile": str},
    },
    "initContainers": [CONTAINER],
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
POD_RULE = {
    "action": str,
    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
    "onPodConditions": [{"type": str, "status": str}],
}
JOB = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "backoffLimitPerIndex": int,
    "maxFailedIndexes": int,
    "activeDeadlineSeconds": int,
    "ttlSecondsAfterFinished": int,
    "suspend": bool,
    "podReplacementPolicy": str,
    "podFailurePolicy": {"rules": [POD_RULE]},
    "successPolicy": {"rules": [{"succeededIndexes": str, "succeededCount": int}]},
    "template": {"metadata": METADATA, "spec": POD},
}
SET = {
    "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
    "startupPolicy": {"startupPolicyOrder": str},
    "failurePolicy": {
        "maxRestarts": int,
        "restartStrategy": str,
        "rules": [
            {
                "name": str,
                "action": str,
                "onJobFailureReasons": [str],
                "onJobFailureMessagePatterns": [str],
                "targetReplicatedJobs": [str],
            }
        ],
    },
    "replicatedJobs": [
        {
            "name": str,
            "replicas": int,
            "template": {"metadata": METADATA, "spec": JOB},
            "dependsOn": [{"name": str, "status": str}],
        }
    ],
}
SERVICE = {
    "clusterIP": str,
    "publishNotReadyAddresses": bool,
    "selector": words,
    "ports": [{"name": str, "port": int, "protocol": str}],
}
PATCH_POD = {key: POD[key] for key in ("nodeSelector", "tolerations", "imagePullSecrets", "volumes", "securityContext")}
PATCH_POD |= {"terminationGracePeriodSeconds": int, "serviceAccountName": str}
PATCH_POD |= {"containers": [{key: CONTAINER[key] for key in ("name", "env", "volumeMounts", "securityContext")}]}
PATCH_JOB = {
    "name": str,
    "template": {"metadata": METADATA, "spec": {"template": {"metadata": METADATA, "spec": PATCH_POD}}},
}
TRAINJOB = {
    "suspend": bool,
    "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
    "trainer": {
        "image": str,
        "command": [str],
        "args": [str],
        "env": CONTAINER["env"],
        "numNodes": int,
        "numProcPerNode": int,
        "resourcesPerNode": CONTAINER["resources"],
    },
    "runtimePatches": [
        {"manager": str, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [PATCH_JOB]}}}},
    ],
}
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Job": ("batch/v1", JOB),
    "JobSet": ("jobset.x-k8s.io/v1alpha2", SET),
    "Service": ("v1", SERVICE),
    "TrainJob": ("trainer.kubeflow.org/v1alpha1", TRAINJOB),
}
SAID = {str: "text", int: "an integer", bool: "true or false"}


def misshapen(value: Any, shape: Any, path: str) -> Iterator[ConfigError]:
    """Unknown fields and wrong types of a value, at any depth."""
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            yield ConfigError(path, value, "must be a mapping", "Write KEY: VALUE")
            return
        for key, inner in value.items():
            if key in shape or "*" in shape:
                yield from misshapen(inner, shape.get(key, shape.get("*")), f"{path}.{key}" if path else str(key))
            else:
                yield ConfigError(f"{path}.{key}", inner, "is not a field of Kubernetes", did_you_mean(key, shape))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield ConfigError(path, value, "must be a list", "Write [A, B]")
            return
        for i, inner in enumerate(value):
            yield from misshapen(inner, shape[0], f"{path}[{i}]")
    elif shape == "quantity":
        if not (isinstance(value, str) and QUANTITY.fullmatch(value)):
            yield ConfigError(path, value, "is not a quantity of Kubernetes", "Write 4, 500m, 64Gi or 1T")
    elif not isinstance(value, shape) or (shape is int and isinstance(value, bool)):
        yield ConfigError(path, value, f"must be {SAID[shape]}", "Quote numbers that are text, and only those")
