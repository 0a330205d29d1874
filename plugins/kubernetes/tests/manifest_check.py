"""What a cluster would refuse, or accept and never start, without one: an oracle for the manifests that are rendered.

The rules are those that an API server 1.36, JobSet 0.11's webhook and the pod security level ``restricted`` applied to
sixty wrong manifests (verdicts.json), and a few that these do not have: exit-code rules and patterns inside a JobSet,
host names too long for its pods. A field that is not listed is refused, as ``kubectl create --validate=strict`` does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from blockwright.plugins.kubernetes.render import Manifest, inner_job
from blockwright.plugins.kubernetes.wanted import ANNOTATIONS, DNS, LABEL, LONGEST, QUANTITY, SUFFIX, VARIABLE, amount

Problems = Iterator[str]
# Fields that are rendered or that a wrong manifest has: text, integers, booleans, quantities.
FIELDS = yaml.safe_load("""
metadata: &metadata {name: str, namespace: str, labels: &words {"*": str}, annotations: *words}
env: &env [{name: str, value: str, valueFrom: {secretKeyRef: {name: str, key: str}}}]
mounts: &mounts [{name: str, mountPath: str, readOnly: bool, subPath: str}]
resources: &resources {limits: {"*": quantity}, requests: {"*": quantity}}
capabilities: &rights
  {allowPrivilegeEscalation: bool, readOnlyRootFilesystem: bool, privileged: bool,
   capabilities: {drop: [str], add: [str]}}
pod: &pod
  nodeSelector: *words
  tolerations: [{key: str, operator: str, value: str, effect: str, tolerationSeconds: int}]
  imagePullSecrets: [{name: str}]
  terminationGracePeriodSeconds: int
  serviceAccountName: str
  securityContext:
    {runAsNonRoot: bool, runAsUser: int, runAsGroup: int, fsGroup: int, fsGroupChangePolicy: str,
     seccompProfile: {type: str, localhostProfile: str}}
  volumes:
    - {name: str, persistentVolumeClaim: {claimName: str, readOnly: bool}, hostPath: {path: str, type: str},
       emptyDir: {medium: str, sizeLimit: quantity}, secret: {secretName: str}, configMap: {name: str}}
job: &job
  {completionMode: str, completions: int, parallelism: int, backoffLimit: int, backoffLimitPerIndex: int,
   maxFailedIndexes: int, activeDeadlineSeconds: int, ttlSecondsAfterFinished: int, suspend: bool,
   podReplacementPolicy: str, successPolicy: {rules: [{succeededIndexes: str, succeededCount: int}]},
   podFailurePolicy: {rules: [{action: str, onExitCodes: {containerName: str, operator: str, values: [int]},
                               onPodConditions: [{type: str, status: str}]}]},
   template: {metadata: *metadata, spec: {<<: *pod, restartPolicy: str, automountServiceAccountToken: bool,
     enableServiceLinks: bool, hostname: str, subdomain: str, priorityClassName: str, containers: [
       {name: str, image: str, imagePullPolicy: str, command: [str], args: [str], workingDir: str, env: *env,
        envFrom: [{secretRef: {name: str}}], resources: *resources, volumeMounts: *mounts,
        terminationMessagePolicy: str, securityContext: *rights}]}}}
Job: *job
JobSet:
  {network: {enableDNSHostnames: bool, publishNotReadyAddresses: bool, subdomain: str}, suspend: bool,
   ttlSecondsAfterFinished: int, startupPolicy: {startupPolicyOrder: str},
   failurePolicy: {maxRestarts: int, restartStrategy: str, rules: [{name: str, action: str,
     onJobFailureReasons: [str], onJobFailureMessagePatterns: [str], targetReplicatedJobs: [str]}]},
   replicatedJobs: [{name: str, replicas: int, template: {metadata: *metadata, spec: *job},
                     dependsOn: [{name: str, status: str}]}]}
Service:
  {clusterIP: str, publishNotReadyAddresses: bool, selector: *words, ports: [{name: str, port: int, protocol: str}]}
TrainJob:
  suspend: bool
  runtimeRef: {apiGroup: str, kind: str, name: str}
  trainer: {image: str, command: [str], args: [str], env: *env, numNodes: int, numProcPerNode: int,
            resourcesPerNode: *resources}
  runtimePatches:
    - manager: str
      trainingRuntimeSpec: {template: {spec: {replicatedJobs: [{name: str, template: {metadata: *metadata, spec:
        {template: {metadata: *metadata, spec: {<<: *pod, containers: [
          {name: str, env: *env, volumeMounts: *mounts, securityContext: *rights}]}}}}}]}}}
""")
VERSIONS = {"Job": "batch/v1", "JobSet": "jobset.x-k8s.io/v1alpha2", "Service": "v1"}
VERSIONS["TrainJob"] = "trainer.kubeflow.org/v1alpha1"
RESTARTS = ["RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"]
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
SAFE_VOLUMES = {"name", "persistentVolumeClaim", "emptyDir", "secret", "configMap"}


def check(manifests: Iterable[Manifest]) -> None:
    """Fail with what is wrong in manifests."""
    assert not (found := [problem for one in manifests for problem in problems(one)]), found


def problems(manifest: Manifest) -> Problems:
    """The mistakes in an object, each with its path and value."""
    kind, spec = manifest["kind"], manifest["spec"]
    if manifest["apiVersion"] != VERSIONS[kind]:
        yield f"apiVersion = {manifest['apiVersion']}"
    if found := list(_misshapen(spec, FIELDS[kind], "spec")):
        yield from found  # other rules read what has the right types
        return
    name = manifest["metadata"].get("name")
    if not (isinstance(name, str) and len(name) <= LONGEST and DNS.fullmatch(name)):
        yield f"metadata.name = {name}: is no host name"
    yield from _metadata(manifest["metadata"], "metadata")
    yield from {"Job": _job, "JobSet": _set, "Service": _service, "TrainJob": _trainjob}[kind](manifest, spec)


def _misshapen(value: Any, shape: Any, path: str) -> Problems:
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in value.items():
            if key in shape or "*" in shape:
                yield from _misshapen(inner, shape.get(key, shape.get("*")), f"{path}.{key}")
            else:
                yield f"{path}.{key}: is not a field"
    elif isinstance(shape, list) and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _misshapen(inner, shape[0], f"{path}[{i}]")
    elif shape == "quantity":
        if not (isinstance(value, str) and QUANTITY.fullmatch(value)):
            yield f"{path} = {value}: is not a quantity"
    elif type(value).__name__ != shape:
        yield f"{path} = {value}: must be {shape}"


def _found(*rules: tuple[Any, str]) -> Problems:
    """Texts of rules that are broken."""
    return (text for broken, text in rules if broken)


def _once(values: Iterable[Any], what: str) -> Problems:
    return (f"{times} {what} named {value}" for value, times in Counter(values).items() if times > 1)


def _negative(values: dict[str, Any], *keys: str) -> Problems:
    return (f"{key} = {values[key]}: is negative" for key in keys if values.get(key, 0) < 0)


def _metadata(metadata: dict[str, Any], path: str) -> Problems:
    for key, value in metadata.get("labels", {}).items():
        if not isinstance(value, str) or len(value) > 63 or not LABEL.fullmatch(value):
            yield f"{path}.labels.{key} = {value}"
    given = metadata.get("annotations", {})
    if sum(len(str(k).encode()) + len(str(v).encode()) for k, v in given.items()) > ANNOTATIONS:
        yield f"{path}.annotations hold more than {ANNOTATIONS:,} bytes"


def _job(manifest: Manifest, spec: dict[str, Any], of_set: bool = False) -> Problems:
    last, indexed = (spec.get("completions") or 1) - 1, spec.get("completionMode") == "Indexed"
    pod, policy = spec["template"].get("spec", {}), spec.get("podFailurePolicy")
    yield from _found(
        (not of_set and len(f"{manifest['metadata'].get('name')}-{last}") > LONGEST, "metadata.name with an index"),
        (indexed and spec.get("completions") is None, "completions are required"),
        ("maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec, "backoffLimitPerIndex is required"),
        ("successPolicy" in spec and not indexed, "successPolicy requires Indexed"),
        (pod.get("restartPolicy") not in ("Never", "OnFailure"), "restartPolicy of a Job"),
        (policy and pod.get("restartPolicy") == "OnFailure", "OnFailure with a podFailurePolicy"),
        (policy and spec.get("podReplacementPolicy", "Failed") != "Failed", "TerminatingOrFailed with a policy"),
    )
    counts = ("completions", "parallelism", "backoffLimit", "backoffLimitPerIndex", "ttlSecondsAfterFinished")
    yield from _negative(spec, *counts)
    yield from _metadata(spec["template"].get("metadata", {}), "spec.template.metadata")
    boxes = [box.get("name") for box in pod.get("containers", [])]
    for i, rule in enumerate((policy or {}).get("rules", [])):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        action = rule.get("action")
        yield from _found(
            (action not in ("Count", "FailIndex", "FailJob", "Ignore"), f"rules[{i}].action = {action}"),
            (action == "FailIndex" and "backoffLimitPerIndex" not in spec, "FailIndex requires backoffLimitPerIndex"),
            ((codes is None) == (conditions is None), f"rules[{i}]: onExitCodes or onPodConditions"),
            (any("status" not in each for each in conditions or []), f"rules[{i}].onPodConditions: no status"),
        )
        if codes:
            values, wanted, operator = codes.get("values", []), codes.get("containerName"), codes.get("operator")
            yield from _found(
                (wanted not in (None, *boxes), f"containerName = {wanted}: is no container of the pod"),
                (operator not in ("In", "NotIn"), f"operator = {operator}"),
                (values != sorted(set(values)), f"values = {values}: write {sorted(set(values))}"),
                (0 in values and operator == "In", f"values = {values}: 0 is success"),
            )
    yield from _pod(pod)


def _pod(pod: dict[str, Any]) -> Problems:
    context = pod.get("securityContext", {})
    profile = context.get("seccompProfile", {}).get("type", "Unconfined")
    yield from _found(
        (not pod.get("containers"), "containers: needs one"),
        (context.get("runAsUser") == 0 and context.get("runAsNonRoot"), "runAsUser = 0: is root"),
        (profile not in ("Localhost", "RuntimeDefault", "Unconfined"), f"seccompProfile.type = {profile}"),
    )
    yield from _once((box.get("name") for box in pod.get("containers", [])), "containers")
    yield from _negative(pod, "terminationGracePeriodSeconds")
    yield from _around(pod)


def _around(pod: dict[str, Any]) -> Problems:
    """Volumes, tolerations and containers, of a pod or of a patch of one."""
    volumes = [volume.get("name") for volume in pod.get("volumes", [])]
    yield from _once(volumes, "volumes")
    for volume in pod.get("volumes", []):
        name, limit = volume.get("name"), volume.get("emptyDir", {}).get("sizeLimit", "0")
        yield from _found(
            (not isinstance(name, str) or len(name) > 63 or not DNS.fullmatch(name), f"volumes.name = {name}"),
            (volume.keys() - SAFE_VOLUMES, f"{volume.keys() - SAFE_VOLUMES}: the level restricted forbids it"),
            (amount(limit) < 0, f"sizeLimit = {limit}"),
        )
    for each in pod.get("tolerations", []):
        operator, effect = each.get("operator", "Equal"), each.get("effect")
        yield from _found(
            (operator not in ("Exists", "Equal", "Lt", "Gt"), f"tolerations.operator = {operator}"),
            (operator == "Exists" and each.get("value"), "tolerations.value with operator Exists"),
            (operator != "Exists" and not each.get("key"), "tolerations.key is required"),
            (
                effect and effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"),
                f"tolerations.effect = {effect}",
            ),
        )
    for i, box in enumerate(pod.get("containers", [])):
        yield from _container(box, volumes, f"containers[{i}]")


def _container(box: dict[str, Any], volumes: list[Any], path: str) -> Problems:
    rights = box.get("securityContext", {})
    if not box.get("image"):
        yield f"{path}.image: is required"
    yield from (f"{path}.securityContext.{k}" for k in ("privileged", "allowPrivilegeEscalation") if rights.get(k))
    for variable in box.get("env", []):
        if not VARIABLE.fullmatch(str(variable.get("name"))):
            yield f"{path}.env: {variable.get('name')} is no name"
    yield from _once((mount.get("mountPath") for mount in box.get("volumeMounts", [])), "mounts")
    for mount in box.get("volumeMounts", []):
        name, where = mount.get("name"), str(mount.get("mountPath"))
        bad = not where.startswith("/") or ":" in where
        yield from _found((name not in volumes, f"{name} is no volume"), (bad, f"mountPath = {where}"))
    limits, requests = (box.get("resources", {}).get(key, {}) for key in ("limits", "requests"))
    for name, value in (*limits.items(), *requests.items()):
        plain = name in ("cpu", "memory", "ephemeral-storage") or name.startswith("hugepages-")
        yield from _found(
            (not plain and "/" not in name, f"{name}: needs the full name of a resource"),
            (amount(value) < 0, f"{name} = {value}: is negative"),
            ("/" in name and amount(value) % 1, f"{name} = {value}: devices are whole numbers"),
        )
    for name, value in requests.items():
        if (limit := limits.get(name)) is None:
            yield from _found(("/" in name, f"{name}: needs a limit"))
        elif "/" in name and amount(value) != amount(limit):
            yield f"{name} = {value}: must equal the limit of {limit}"
        elif amount(value) > amount(limit):
            yield f"{name} = {value}: is above the limit of {limit}"


def _set(manifest: Manifest, spec: dict[str, Any]) -> Problems:
    jobs, policy = spec.get("replicatedJobs") or [], spec.get("failurePolicy", {})
    yield from _once((job.get("name") for job in jobs), "jobs")
    if "startupPolicy" in spec and any("dependsOn" in job for job in jobs):
        yield "startupPolicy and dependsOn exclude each other"
    for job in jobs:
        last = (job.get("template", {}).get("spec", {}).get("completions") or 1) - 1
        yield from _negative(job, "replicas")
        yield from _longest(f"{manifest['metadata'].get('name')}-{job.get('name')}-0-{last}")
    yield from _negative(policy, "maxRestarts")
    yield from _once((rule.get("name") for rule in policy.get("rules", [])), "rules")
    if policy.get("restartStrategy", "Recreate") not in ("Recreate", "BlockingRecreate", "InPlaceRestart"):
        yield f"restartStrategy = {policy['restartStrategy']}"
    for rule in policy.get("rules", []):
        yield from _found(
            (not rule.get("name"), "failurePolicy.rules.name"),
            (rule.get("action") not in ("FailJobSet", *RESTARTS), f"action = {rule.get('action')}"),
        )
        yield from (f"onJobFailureReasons = {r}" for r in rule.get("onJobFailureReasons", []) if r not in REASONS)
        for pattern in rule.get("onJobFailureMessagePatterns", []):
            try:
                re.compile(pattern)
            except re.error:
                yield f"{pattern} is not a regular expression, and no server would say so"
    if (inner := inner_job(manifest)) is not None:
        yield from _job(inner, inner["spec"], of_set=True)


def _longest(name: str) -> Problems:
    return _found((len(name + SUFFIX) > LONGEST, f"metadata.name makes names of pods too long: {name}{SUFFIX}"))


def _service(manifest: Manifest, spec: dict[str, Any]) -> Problems:
    return (f"port = {p.get('port')}" for p in spec.get("ports", []) if not 1 <= p.get("port", 0) <= 65535)


def _trainjob(manifest: Manifest, spec: dict[str, Any]) -> Problems:
    trainer = spec["trainer"]
    yield from _longest(f"{manifest['metadata'].get('name')}-node-0-{trainer.get('numNodes', 1) - 1}")
    yield from (f"{v['name']} is the trainer's" for v in trainer.get("env", []) if v["name"].startswith("PET_"))
    yield from _container({**trainer, "resources": trainer.get("resourcesPerNode", {})}, [], "trainer")
    for patch in spec.get("runtimePatches", []):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            template = job["template"]["spec"]["template"]
            boxes = [{"image": "of the runtime", **box} for box in template["spec"].get("containers", [])]
            yield from _metadata(template.get("metadata", {}), "runtimePatches")
            yield from _around({**template["spec"], "containers": boxes})
