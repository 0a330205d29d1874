"""What happens to the pods of a job, in words: what keeps them from starting, and how they ended."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from blockwright.plugins.kubernetes.options import GROUP
from blockwright.training.result import DIVERGED

LOST_S = 60  # beyond its grace period, after which a pod that is being deleted has lost its node
INDEX = "batch.kubernetes.io/job-completion-index"
CAUSES = {
    "EvictionByEvictionAPI": "evicted (a drain or a consolidation)",
    "PreemptionByScheduler": "preempted by a pod of higher priority",
    "DeletionByTaintManager": "its node is lost or tainted",
    "TerminationByKubelet": "its node shuts down or is short of memory or disk",
    "DeletionByPodGC": "its node is gone",
}
REMEDIES = {  # of what keeps a pod from starting
    "ErrImagePull": "check hydra.launcher.image and pull_secrets",
    "ImagePullBackOff": "check hydra.launcher.image and pull_secrets",
    "ErrImageNeverPull": "the node must have the image: check hydra.launcher.image",
    "InvalidImageName": "check hydra.launcher.image",
    "CreateContainerConfigError": "check hydra.launcher.secrets, and that the image's user is not root",
    "CreateContainerError": "check hydra.launcher.volumes and image",
    "RunContainerError": "check the image: it must have python and this project",
    "Unschedulable": "no node has what it asks for: check gpus, cpu, memory, node_selector, tolerations and the claim",
    "FailedMount": "check hydra.launcher.claim, volumes and secrets, and the storage behind them",
    "FailedAttachVolume": "a disk is attached elsewhere or gone: check hydra.launcher.claim and volumes",
    "FailedCreatePodSandBox": "the network of its node starts no pods: ask who runs the cluster",
    "Pending": "kubectl describe pod says more; a large image may need a longer hydra.launcher.start_deadline_s",
}
OF_MESSAGE = (  # pattern, remedy of a controller that makes no pods; the first one counts
    (r"exceeded quota", "the namespace's quota is used up: lower hydra.launcher.parallel, or name a queue"),
    (r"violates PodSecurity", "leave hydra.launcher.capabilities out, or name another namespace"),
    (r"PriorityClass", "check hydra.launcher.priority: kubectl get priorityclasses"),
    (r"serviceaccount", "the namespace has no service account yet: kubectl get serviceaccounts"),
    (r"must specify", "the namespace's quota wants limits: set hydra.launcher.cpu and memory"),
    (r"usage per|limit range|LimitRange", "change cpu, memory or gpus of hydra.launcher: kubectl get limitranges"),
)
FORBIDDEN = "an admission policy of the cluster forbids its pods: its message says which"
QUEUED = "waits in its queue"
Object = Mapping[str, Any]


def number_of(one: Object) -> int:
    """The job that an object belongs to."""
    return int(one["metadata"]["labels"][f"{GROUP}/job"])


def is_first(pod: Object) -> bool:
    """Whether a pod is its job's first node, which reports."""
    metadata = pod["metadata"]
    return str({**metadata.get("annotations", {}), **metadata.get("labels", {})}.get(INDEX, "0")) == "0"


def ending(job: Object) -> tuple[str, str] | None:
    """``completed`` or ``failed``, and the controller's reason; None while a Job, JobSet or TrainJob is at work."""
    for each in job.get("status", {}).get("conditions") or []:
        if each["status"] == "True" and each["type"] in ("Complete", "Completed", "Failed"):
            kind = "failed" if each["type"] == "Failed" else "completed"
            return kind, f"{each.get('reason', '')}: {each.get('message', '')}"
    return None


def is_queued(job: Object) -> bool:
    """Whether a queue holds a job back."""
    return bool(job.get("spec", {}).get("suspend"))


def obstacle(pod: Object) -> tuple[str, str] | None:
    """What keeps a pod from starting: reason and message; None if nothing does."""
    status = pod.get("status", {})
    if not is_pending(pod):
        return None
    for each in status.get("containerStatuses") or []:
        waits = each.get("state", {}).get("waiting") or {}
        if waits.get("reason") in REMEDIES:
            return waits["reason"], waits.get("message", "")
    for each in status.get("conditions") or []:
        if (each["type"], each["status"]) == ("PodScheduled", "False"):
            return each.get("reason", "Unschedulable"), each.get("message", "")
    return None


def blocked(reason: str, message: str) -> str:
    """An obstacle in a line, with the remedy."""
    remedy = REMEDIES.get(reason, "kubectl describe pod says more")
    if reason == "FailedCreate":
        message = re.sub(r'pods "[^"]*"', "pods", message)  # of a random name, another at each try
        remedy = next((said for pattern, said in OF_MESSAGE if re.search(pattern, message)), FORBIDDEN)
    return f"cannot start: {reason}{f' ({shortened(message)})' if message else ''}. Remedy: {remedy}"


def shortened(message: str, most: int = 300) -> str:
    """A message in a line. What is left out is in the middle, for the cause comes last."""
    text = " ".join(message.split())
    return text if len(text) <= most else f"{text[: most // 3]} … {text[-2 * most // 3 :]}"


def is_pending(pod: Object) -> bool:
    """Whether none of a pod's containers has started."""
    return pod.get("status", {}).get("phase", "Pending") == "Pending"


def line(pod: Object, now: float) -> str:
    """The state of a pod in a line."""
    status, parts = pod.get("status", {}), []
    for each in status.get("conditions") or []:
        if (each["type"], each["status"]) == ("DisruptionTarget", "True"):
            parts.append(CAUSES.get(each.get("reason"), f"disrupted ({each.get('reason')})"))
    if found := obstacle(pod):
        parts.append(blocked(*found))
    if end := terminated(pod):
        parts.append(exit_words(end))
    elif pod["metadata"].get("deletionTimestamp"):
        lost = is_lost(pod, now)
        node = pod.get("spec", {}).get("nodeName", "")
        taint = f"kubectl taint node {node} node.kubernetes.io/out-of-service"
        remedy = f"if the machine is off, {taint}=nodeshutdown:NoExecute, and {taint}- when it is back"
        parts.append(f"its node {node} does not answer. Remedy: {remedy}" if lost else "is being stopped")
    return "; ".join([str(status.get("phase", "Pending")).lower(), *parts])


def is_lost(pod: Object, now: float) -> bool:
    """Whether a pod should have ended long ago, so that its node no longer answers."""
    gone = pod["metadata"].get("deletionTimestamp")  # when its grace period is over
    return bool(gone) and terminated(pod) is None and now - seconds(gone) > LOST_S


def seconds(stamp: str) -> float:
    """A time as servers write it, in seconds since 1970."""
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def terminated(pod: Object) -> dict[str, Any] | None:
    """The end of a pod's container."""
    for each in pod.get("status", {}).get("containerStatuses") or []:
        if end := each.get("state", {}).get("terminated"):
            return end
    return None


def exit_words(end: Object) -> str:
    """An exit code and the kernel's reason in words."""
    code = end.get("exitCode")
    if end.get("reason") == "OOMKilled":
        return f"out of memory (exit {code}). Remedy: raise hydra.launcher.memory"
    words = {0: "done", 64: "refused", 70: "diverged", 75: "stopped, its state saved", 137: "killed", 143: "terminated"}
    return f"exit {code} ({words[code]})" if code in words else f"exit {code}"


def results(state: str, reason: str, pods: Sequence[Object]) -> dict[str, Any]:
    """What a job came to: what its first node's last pod says, else what the controller says.

    Args:
        state: ``completed`` or ``failed``
        reason: the controller's
        pods: of the job, the oldest first
    """
    ends = [end for pod in pods if is_first(pod) and (end := terminated(pod))]
    if state == "completed":
        ends = [end for end in ends if end.get("exitCode") == 0]
    said = _said(ends[-1]) if ends else {}
    if state == "completed":
        return {"metrics": {}, **said, "status": said.get("status", "completed")}
    others = [
        end for pod in pods if not is_first(pod) and (end := terminated(pod)) and end.get("exitCode") not in (0, 75)
    ]
    if (not ends or said.get("code") == 75) and others:  # another node failed
        said = _said(others[-1])
    why = [said["reason"]] if said.get("reason") else []
    if any(end.get("reason") == "OOMKilled" for end in [*ends[-1:], *others[-1:]]):
        why.insert(0, "out of memory: raise hydra.launcher.memory")
    why += [] if why else [reason]
    status = "diverged" if said.get("code") == DIVERGED else "failed"
    return {**said, "status": status, "reason": "; ".join(why)}


def _said(end: Object) -> dict[str, Any]:
    try:
        found = json.loads(end.get("message") or "{}")
        return found if isinstance(found, dict) else {}
    except ValueError:  # no message was written: the last lines of its log
        lines = [text for text in str(end["message"]).splitlines() if text.strip()]
        return {"code": end.get("exitCode"), "reason": " / ".join(lines[-3:])}
