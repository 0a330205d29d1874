"""What a cluster would refuse, or accept and never start, without one: an oracle for the manifests that are rendered.

The rules of objects are those that an API server 1.36, JobSet 0.11's webhook and the pod security level ``restricted``
applied to sixty wrong manifests (verdicts.json), and a few that these do not have: exit-code rules
and patterns inside a JobSet, host names too long for its pods.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from manifest_shape import KINDS, misshapen

from blockwright.plugins.kubernetes.render import Manifest, inner_job
from blockwright.plugins.kubernetes.syntax import ANNOTATIONS, DNS, LABEL, LONGEST, SUFFIX, VARIABLE, amount
from blockwright.registry import ConfigError, did_you_mean

STANDARD = ("cpu", "memory", "ephemeral-storage")
POD_ACTIONS = ("Count", "FailIndex", "FailJob", "Ignore")
SET_ACTIONS = (
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
)
STRATEGIES = ("Recreate", "BlockingRecreate", "InPlaceRestart")
REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
PROFILES = ("Localhost", "RuntimeDefault", "Unconfined")
SAFE_VOLUMES = ("persistentVolumeClaim", "emptyDir", "secret", "configMap")
Problems = Iterator[ConfigError]


def check(manifests: Iterable[Manifest]) -> None:
    """Refuse manifests.

    Raises:
        ConfigError: the first mistake, with its path in the manifest
    """
    for manifest in manifests:
        for problem in problems(manifest):
            raise problem


def problems(manifest: Manifest) -> Problems:
    """The mistakes in an object."""
    kind = manifest.get("kind")
    if kind not in KINDS:
        yield ConfigError("kind", kind, "is not created here", did_you_mean(kind, KINDS))
        return
    version, shape = KINDS[str(kind)]
    spec, found = manifest.get("spec", {}), False
    if manifest.get("apiVersion") != version:
        yield ConfigError("apiVersion", manifest.get("apiVersion"), f"is not that of a {kind}", f"Write {version}")
    for problem in misshapen(spec, shape, "spec"):
        found = True
        yield problem
    if found:  # other rules read what has the right types
        return
    yield from _metadata(manifest.get("metadata", {}), "metadata")
    rules = {"Job": _job, "JobSet": _set, "Service": _service, "TrainJob": _trainjob}
    yield from rules[str(kind)](manifest, spec)


def _one_of(value: Any, known: Sequence[str], path: str) -> Problems:
    if value not in known:
        yield ConfigError(path, value, "is not one of the known", did_you_mean(value, known))


def _missing(path: str, what: str = "is required") -> ConfigError:
    return ConfigError(path, None, what, "Write it")


def _metadata(metadata: Mapping[str, Any], path: str) -> Problems:
    name = metadata.get("name")
    if path == "metadata" and not (isinstance(name, str) and len(name) <= LONGEST and DNS.fullmatch(name)):
        rule = f"must be at most {LONGEST} lower-case letters, digits and hyphens, as a host name"
        yield ConfigError(f"{path}.name", name, rule, "Shorten task_name")
    for key, value in metadata.get("labels", {}).items():
        if not isinstance(value, str) or len(value) > 63 or not LABEL.fullmatch(value):
            rule = (
                "a label has at most 63 letters, digits, hyphens, underscores and dots, and ends in a letter or digit"
            )
            yield ConfigError(f"{path}.labels.{key}", value, rule, "Use an annotation")
    given = metadata.get("annotations", {})
    if sum(len(str(k).encode()) + len(str(v).encode()) for k, v in given.items()) > ANNOTATIONS:
        yield ConfigError(f"{path}.annotations", "…", f"hold more than {ANNOTATIONS:,} bytes", "Put it on the volume")


def _job(manifest: Manifest, spec: Mapping[str, Any], of_set: bool = False) -> Problems:
    name, last = str(manifest["metadata"].get("name")), (spec.get("completions") or 1) - 1
    if len(f"{name}-{last}") > LONGEST and not of_set:
        rule = f"with an index is the host name of its pods, which has at most {LONGEST} letters"
        yield ConfigError("metadata.name", name, rule, "Shorten task_name")
    indexed = spec.get("completionMode") == "Indexed"
    if indexed and spec.get("completions") is None:
        yield _missing("spec.completions", "is required in completion mode Indexed")
    for key in ("completions", "parallelism", "backoffLimit", "backoffLimitPerIndex", "ttlSecondsAfterFinished"):
        if spec.get(key, 0) < 0:
            yield ConfigError(f"spec.{key}", spec[key], "must not be negative", "Write 0 or more")
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield _missing("spec.backoffLimitPerIndex", "is required with maxFailedIndexes")
    if "successPolicy" in spec and not indexed:
        yield ConfigError(
            "spec.successPolicy", "…", "requires completion mode Indexed", "Write completionMode: Indexed"
        )
    template = spec.get("template", {})
    yield from _metadata(template.get("metadata", {}), "spec.template.metadata")
    pod = template.get("spec", {})
    if "podFailurePolicy" in spec:
        yield from _failure_policy(spec, pod)
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        path, remedy = "spec.template.spec.restartPolicy", "Write Never"
        yield ConfigError(path, pod.get("restartPolicy"), "of a Job must be Never or OnFailure", remedy)
    yield from _pod(pod, "spec.template.spec")


def _failure_policy(spec: Mapping[str, Any], pod: Mapping[str, Any]) -> Problems:
    if pod.get("restartPolicy") == "OnFailure":
        rule = "with a podFailurePolicy only Never is supported"
        yield ConfigError("spec.template.spec.restartPolicy", "OnFailure", rule, "Write Never")
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        rule = "with a podFailurePolicy only Failed is supported"
        yield ConfigError("spec.podReplacementPolicy", spec["podReplacementPolicy"], rule, "Leave it out")
    containers = [c.get("name") for c in (*pod.get("containers", []), *pod.get("initContainers", []))]
    rules = spec["podFailurePolicy"].get("rules", [])
    if len(rules) > 20:
        yield ConfigError("spec.podFailurePolicy.rules", len(rules), "are at most 20", "Join some")
    for i, each in enumerate(rules):
        path = f"spec.podFailurePolicy.rules[{i}]"
        yield from _one_of(each.get("action"), POD_ACTIONS, f"{path}.action")
        if each.get("action") == "FailIndex" and "backoffLimitPerIndex" not in spec:
            yield ConfigError(f"{path}.action", "FailIndex", "requires backoffLimitPerIndex", "Write FailJob")
        if ("onExitCodes" in each) == ("onPodConditions" in each):
            rule = "needs either onExitCodes or onPodConditions"
            yield ConfigError(path, sorted(each), rule, "Make it two rules")
        for j, condition in enumerate(each.get("onPodConditions", [])):
            if "status" not in condition:
                yield _missing(f"{path}.onPodConditions[{j}].status")
        if codes := each.get("onExitCodes"):
            yield from _exit_codes(codes, containers, f"{path}.onExitCodes")


def _exit_codes(codes: Mapping[str, Any], containers: Sequence[Any], path: str) -> Problems:
    values, wanted = codes.get("values", []), codes.get("containerName")
    if wanted is not None and wanted not in containers:
        yield ConfigError(
            f"{path}.containerName", wanted, "is no container of the pod", did_you_mean(wanted, containers)
        )
    yield from _one_of(codes.get("operator"), ("In", "NotIn"), f"{path}.operator")
    if values != sorted(set(values)):
        yield ConfigError(
            f"{path}.values", values, "must be ordered, and each be there once", f"Write {sorted(set(values))}"
        )
    if 0 in values and codes.get("operator") == "In":
        yield ConfigError(f"{path}.values", values, "must not contain 0, which is success", "Leave 0 out")


def _pod(pod: Mapping[str, Any], path: str) -> Problems:
    containers = pod.get("containers") or []
    if not containers:
        yield _missing(f"{path}.containers", "needs at least one container")
    yield from _once([c.get("name") for c in containers], f"{path}.containers", "container")
    volumes = pod.get("volumes", [])
    yield from _once([v.get("name") for v in volumes], f"{path}.volumes", "volume")
    for i, volume in enumerate(volumes):
        yield from _volume(volume, f"{path}.volumes[{i}]")
    for i, container in enumerate(containers):
        yield from _container(container, [v.get("name") for v in volumes], f"{path}.containers[{i}]")
    if pod.get("terminationGracePeriodSeconds", 0) < 0:
        rule = "must not be negative: it would be taken as 1"
        yield ConfigError(
            f"{path}.terminationGracePeriodSeconds", pod["terminationGracePeriodSeconds"], rule, "Write 60 or more"
        )
    for i, toleration in enumerate(pod.get("tolerations", [])):
        yield from _toleration(toleration, f"{path}.tolerations[{i}]")
    yield from _security(pod.get("securityContext", {}), f"{path}.securityContext")


def _once(names: Sequence[Any], path: str, what: str) -> Problems:
    for name, times in Counter(names).items():
        if times > 1:
            yield ConfigError(path, name, f"{times} {what}s have this name", "Rename all but one")


def _volume(volume: Mapping[str, Any], path: str) -> Problems:
    name = volume.get("name")
    if not isinstance(name, str) or len(name) > 63 or not DNS.fullmatch(name):
        yield ConfigError(f"{path}.name", name, "must be lower-case letters, digits and hyphens", "Rename it")
    for source in volume.keys() - {"name"} - set(SAFE_VOLUMES):
        rule = "would violate the pod security level restricted"
        yield ConfigError(f"{path}.{source}", volume[source], rule, "Use a PersistentVolumeClaim")
    limit = volume.get("emptyDir", {}).get("sizeLimit")
    if limit is not None and amount(limit) < 0:
        yield ConfigError(f"{path}.emptyDir.sizeLimit", limit, "must not be negative", "Write e.g. 8Gi")


def _container(container: Mapping[str, Any], volumes: Sequence[Any], path: str) -> Problems:
    if not container.get("image"):
        yield _missing(f"{path}.image")
    for i, variable in enumerate(container.get("env", [])):
        if not VARIABLE.fullmatch(str(variable.get("name"))):
            rule = "must be the name of an environment variable, without spaces"
            yield ConfigError(f"{path}.env[{i}].name", variable.get("name"), rule, "Write letters, digits and _")
    mounts = container.get("volumeMounts", [])
    yield from _once([m.get("mountPath") for m in mounts], f"{path}.volumeMounts", "mount")
    for i, mount in enumerate(mounts):
        if mount.get("name") not in volumes:
            yield ConfigError(
                f"{path}.volumeMounts[{i}].name",
                mount.get("name"),
                "is no volume of the pod",
                did_you_mean(mount.get("name"), volumes),
            )
        where = str(mount.get("mountPath"))
        if not where.startswith("/") or ":" in where:
            rule = "must be an absolute path without a colon: a container runtime refuses others when the pod starts"
            yield ConfigError(f"{path}.volumeMounts[{i}].mountPath", where, rule, "Write e.g. /runs")
    yield from _resources(container.get("resources", {}), f"{path}.resources")
    context = container.get("securityContext", {})
    for key in ("privileged", "allowPrivilegeEscalation"):
        if context.get(key):
            rule = "would violate the pod security level restricted"
            yield ConfigError(f"{path}.securityContext.{key}", True, rule, "Write false")


def _resources(resources: Mapping[str, Mapping[str, str]], path: str) -> Problems:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for where, given in (("limits", limits), ("requests", requests)):
        for name, value in given.items():
            at = f"{path}.{where}.{name}"
            if name not in STANDARD and "/" not in name and not name.startswith("hugepages-"):
                rule = "must be cpu, memory, ephemeral-storage or the full name of a resource"
                yield ConfigError(at, value, rule, "Write e.g. nvidia.com/gpu")
            if amount(value) < 0:
                yield ConfigError(at, value, "must not be negative", "Write 0 or more")
            elif "/" in name and amount(value) % 1:
                yield ConfigError(at, value, "is a device, of which there are whole numbers", "Write an integer")
    for name, value in requests.items():
        limit = limits.get(name)
        if limit is None and "/" in name:
            yield ConfigError(f"{path}.limits", None, f"is required for the device {name}", "Write it as requested")
        elif limit is not None and (amount(value) > amount(limit) or ("/" in name and amount(value) != amount(limit))):
            rule = f"must equal the limit of {limit}" if "/" in name else f"is above the limit of {limit}"
            yield ConfigError(f"{path}.requests.{name}", value, rule, f"Write {limit}")


def _toleration(toleration: Mapping[str, Any], path: str) -> Problems:
    operator = toleration.get("operator", "Equal")
    yield from _one_of(operator, ("Exists", "Equal", "Lt", "Gt"), f"{path}.operator")
    if operator == "Exists" and toleration.get("value"):
        rule = "must be empty when operator is Exists"
        yield ConfigError(f"{path}.value", toleration["value"], rule, "Write operator: Equal, or leave the value out")
    if operator != "Exists" and not toleration.get("key"):
        yield _missing(f"{path}.key", f"is required with operator {operator}")
    if toleration.get("effect"):
        yield from _one_of(toleration["effect"], ("NoSchedule", "PreferNoSchedule", "NoExecute"), f"{path}.effect")


def _security(context: Mapping[str, Any], path: str) -> Problems:
    if context.get("runAsUser") == 0 and context.get("runAsNonRoot"):
        rule = "is root, but runAsNonRoot is true: the pod would never start"
        yield ConfigError(f"{path}.runAsUser", 0, rule, "Write 1000")
    profile = context.get("seccompProfile", {}).get("type")
    if profile is not None:
        yield from _one_of(profile, PROFILES, f"{path}.seccompProfile.type")


def _set(manifest: Manifest, spec: Mapping[str, Any]) -> Problems:
    jobs, name = spec.get("replicatedJobs") or [], str(manifest["metadata"].get("name"))
    yield from _once([j.get("name") for j in jobs], "spec.replicatedJobs", "job")
    if "startupPolicy" in spec and any("dependsOn" in j for j in jobs):
        yield ConfigError("spec.startupPolicy", "…", "and dependsOn exclude each other", "Leave startupPolicy out")
    for i, each in enumerate(jobs):
        path, replicas = f"spec.replicatedJobs[{i}]", each.get("replicas", 1)
        if replicas < 0:
            yield ConfigError(f"{path}.replicas", replicas, "must not be negative", "Write 1")
        inside = each.get("template", {}).get("spec", {})
        last = (inside.get("completions") or 1) - 1
        longest = f"{name}-{each.get('name')}-{max(replicas - 1, 0)}-{last}{SUFFIX}"
        if len(longest) > LONGEST:
            rule = f"makes names of pods of {len(longest)} letters ({longest}), and {LONGEST} are allowed"
            yield ConfigError("metadata.name", name, rule, "Shorten task_name")
    yield from _set_policy(spec.get("failurePolicy", {}))
    if jobs and (inner := inner_job(manifest)) is not None:
        for problem in _job(inner, inner["spec"], of_set=True):
            path = f"spec.replicatedJobs[0].template.{problem.path}"
            yield ConfigError(path, problem.value, problem.rule, problem.remedy)


def _set_policy(policy: Mapping[str, Any]) -> Problems:
    path = "spec.failurePolicy"
    if policy.get("maxRestarts", 0) < 0:
        yield ConfigError(f"{path}.maxRestarts", policy["maxRestarts"], "must not be negative", "Write 0 or more")
    if "restartStrategy" in policy:
        yield from _one_of(policy["restartStrategy"], STRATEGIES, f"{path}.restartStrategy")
    yield from _once([r.get("name") for r in policy.get("rules", [])], f"{path}.rules", "rule")
    for i, each in enumerate(policy.get("rules", [])):
        at = f"{path}.rules[{i}]"
        if not each.get("name"):
            yield _missing(f"{at}.name")
        yield from _one_of(each.get("action"), SET_ACTIONS, f"{at}.action")
        for reason in each.get("onJobFailureReasons", []):
            yield from _one_of(reason, REASONS, f"{at}.onJobFailureReasons")
        for pattern in each.get("onJobFailureMessagePatterns", []):
            try:
                re.compile(pattern)
            except re.error as error:
                rule = f"is not a regular expression ({error}), and no server would say so"
                yield ConfigError(f"{at}.onJobFailureMessagePatterns", pattern, rule, "Correct it")


def _service(manifest: Manifest, spec: Mapping[str, Any]) -> Problems:
    for i, port in enumerate(spec.get("ports", [])):
        if not 1 <= port.get("port", 0) <= 65535:
            yield ConfigError(f"spec.ports[{i}].port", port.get("port"), "must be 1 to 65535", "Write it")


def _trainjob(manifest: Manifest, spec: Mapping[str, Any]) -> Problems:
    name, nodes = str(manifest["metadata"].get("name")), spec.get("trainer", {}).get("numNodes", 1)
    if len(longest := f"{name}-node-0-{nodes - 1}{SUFFIX}") > LONGEST:
        rule = f"makes names of pods of {len(longest)} letters, and {LONGEST} are allowed"
        yield ConfigError("metadata.name", name, rule, "Shorten task_name")
    for variable in spec["trainer"].get("env", []):
        if variable["name"].startswith("PET_"):
            yield ConfigError("spec.trainer.env", variable["name"], "is set by the trainer", "Leave it out")
    yield from _container(
        {**spec["trainer"], "resources": spec["trainer"].get("resourcesPerNode", {})}, [], "spec.trainer"
    )
    for patch in spec.get("runtimePatches", []):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            path = "spec.runtimePatches.template"
            yield from _metadata(job["template"]["spec"]["template"].get("metadata", {}), path)
            pod = job["template"]["spec"]["template"]["spec"]
            volumes = [v.get("name") for v in pod.get("volumes", [])]
            for volume in pod.get("volumes", []):
                yield from _volume(volume, f"{path}.volumes")
            for container in pod.get("containers", []):
                yield from _container({"image": "of the runtime", **container}, volumes, f"{path}.containers")
            for toleration in pod.get("tolerations", []):
                yield from _toleration(toleration, f"{path}.tolerations")
