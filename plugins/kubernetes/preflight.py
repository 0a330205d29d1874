"""What a cluster must have before anything is created on it: a login, rights, definitions, claims, secrets, queues."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress

from blockwright.plugins.kubernetes.cluster import Cluster, NoRoom, NotFound
from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.render import Manifest, inner_job
from blockwright.registry import ConfigError

RESOURCES = {"job": "jobs.batch", "jobset": "jobsets.jobset.x-k8s.io", "trainjob": "trainjobs.trainer.kubeflow.org"}
LOSS = "its pods restart one by one, so that peers wait for a lost one until the group times out, and each counts"
BATCH = 50  # objects of a call


def settle(cluster: Cluster, options: Options) -> Options:
    """Check login and rights, and choose the kind of object.

    Raises:
        ConfigError: no login, a missing right, or a missing definition
    """
    if cluster.namespace:
        _find(cluster, "namespace", "namespace", cluster.namespace, "kubectl create namespace NAME, or name another")
    kind = options.made_as
    group = RESOURCES[kind].partition(".")[2]
    if kind != "job" and not cluster.has(group):
        if options.kind != "auto":
            rule, remedy = f"the cluster has no {kind} ({group})", "Have it installed, or write hydra.launcher.kind=job"
            raise ConfigError("hydra.launcher.kind", options.kind, rule, remedy)
        kind = "job"
        cluster.say(f"the cluster has no JobSet, so each job is an Indexed Job with a Service: {LOSS}")
    rights: list[tuple[str, ...]] = [("create", RESOURCES[kind]), ("delete", RESOURCES[kind]), ("get", "pods")]
    rights.append(("get", "pods", "--subresource=log"))
    if kind == "job" and options.nodes > 1:
        rights.append(("create", "services"))
    for verb, resource, *more in rights:
        if not cluster.may(verb, resource, *more):
            rule = f"you may not {verb} {resource}{' logs' if more else ''} here, if it exists"
            remedy = "Check its name, or ask for the role of deploy/kubernetes/role.yaml"
            raise ConfigError("hydra.launcher.namespace", cluster.namespace, rule, remedy)
    return dataclasses.replace(options, kind=kind)


def needs(cluster: Cluster, options: Options) -> None:
    """Check that what pods refer to exists: a server accepts names of what does not, and no pod ever starts.

    Raises:
        ConfigError: a missing claim, secret, queue, priority or runtime, or a claim for one node only
    """
    for claim in (options.claim, *options.volumes):
        name = "claim" if claim == options.claim else "volumes"
        found = _find(cluster, name, "persistentvolumeclaim", claim, "See deploy/kubernetes/claim.yaml")
        modes = found.get("spec", {}).get("accessModes", ["ReadWriteMany"])
        if not {"ReadWriteMany", "ReadOnlyMany"} & set(modes) and (options.nodes > 1 or options.parallel > 1):
            rule = f"is {', '.join(modes)}, so only pods on one machine can use it"
            remedy = "Name a ReadWriteMany claim, or write hydra.launcher.parallel=1 with nodes=1"
            raise ConfigError(f"hydra.launcher.{name}", claim, rule, remedy)
    for name, secrets in (("secrets", options.secrets), ("pull_secrets", options.pull_secrets)):
        for secret in secrets:
            _find(cluster, name, "secret", secret, "kubectl create secret generic NAME --from-literal=KEY=VALUE")
    if options.queue and not cluster.has("kueue.x-k8s.io"):
        rule = "is Kueue's, which the cluster does not have: the jobs would not queue"
        raise ConfigError("hydra.launcher.queue", options.queue, rule, "Have Kueue installed, or leave it out")
    if options.queue:
        _find(cluster, "queue", "localqueues.kueue.x-k8s.io", options.queue, "kubectl get localqueues")
    if options.priority:
        kind = "workloadpriorityclasses.kueue.x-k8s.io" if options.queue else "priorityclass"
        _find(cluster, "priority", kind, options.priority, f"kubectl get {kind}")
    if options.made_as == "trainjob":
        kind = "clustertrainingruntimes.trainer.kubeflow.org"
        _find(cluster, "runtime", kind, options.runtime, "Apply deploy/kubernetes/runtime.yaml")


def _find(cluster: Cluster, option: str, kind: str, name: str, remedy: str) -> Manifest:
    try:
        return cluster.find(kind, name) or {}
    except NotFound:
        rule = f"there is no {kind.partition('.')[0]} of this name in the namespace"
        raise ConfigError(f"hydra.launcher.{option}", name, rule, remedy) from None


def rehearse(cluster: Cluster, manifests: Sequence[Manifest]) -> None:
    """Have the server check all objects, and the Job inside a JobSet, which it would not look into.

    A quota counts what is only tried, too. It may be filled by jobs that end, so it is no refusal here.

    Raises:
        ConfigError: one is refused, or its pods would be
    """
    tried = [each for one in manifests for each in (one, inner_job(one)) if each is not None]
    for i in range(0, len(tried), BATCH):
        warned = ""
        with suppress(NoRoom):
            warned = cluster.create(tried[i : i + BATCH], rehearsed=True)
        if "would violate PodSecurity" in warned:
            found = warned[warned.index("would violate") :].splitlines()[0]
            rule = f"its pod security level forbids these pods, which would never start ({found[:200]})"
            remedy = "Leave hydra.launcher.capabilities out, or name another namespace"
            raise ConfigError("hydra.launcher.namespace", cluster.namespace, rule, remedy)
