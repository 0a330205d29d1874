"""A cluster in a JSON file, and the kubectl that speaks to it: run as a program, this file is kubectl.

Jobs and JobSets obey their failure policies, as an API server 1.36, its job controller and JobSet 0.11 did when asked
(plugins/kubernetes/README.md). A pod's containers end as the test scripts them, one outcome an attempt. Each listing of
pods is a moment in the life of the cluster, so nothing depends on time. Imports only the standard library.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

KINDS = {"job": "Job", "jobset": "JobSet", "trainjob": "TrainJob", "pod": "Pod", "service": "Service"}
SET = "jobset.sigs.k8s.io/jobset-name"
Object = dict[str, Any]


class Refusal(Exception):  # noqa: N818 - an answer
    """What kubectl writes to stderr before it ends with 1."""


class ScriptedCluster:
    """A cluster.

    Args:
        folder: of its file

    Keys of the file, for tests: ``outcomes`` (job number → {code, message, reason, disrupted, index} of each
    attempt; with an index, of that node alone), ``pending`` (job number → what its pods wait for), ``podless``
    (job numbers), ``lacks`` (API groups), ``faults`` ({match, stderr, times, after, from}: after means that the
    call is carried out and its answer lost, from is the first call's number), ``stuck`` (names of jobs whose pods
    do not end when they are deleted), ``events`` (name of an object, or ``pods of N`` → a message or an
    event), ``context``, ``namespace`` and ``uid`` of it, ``missing`` and ``forbidden`` (names of what pods
    refer to), ``since`` (when its clock began, in seconds since 1970), ``denied`` (verbs), ``warning`` (of dry
    runs), ``calls``, ``made`` and ``deleted`` (names, one each time), ``alive`` (jobs with processes, kept by a
    node that runs pods in earnest: node.py).
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cluster.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            empty = {"objects": {}, "made": [], "calls": [], "clock": 0, "deleted": []}
            self.file.write_text(json.dumps({**empty, "since": time.time()}))

    @contextlib.contextmanager
    def open(self) -> Iterator[Object]:
        """The state, to change."""
        with (self.file.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads(self.file.read_text())
            try:
                yield state
            finally:  # a kubectl that is killed leaves the cluster as it was
                draft = self.file.with_suffix(".new")
                draft.write_text(json.dumps(state))
                draft.replace(self.file)

    def run(self, command: list[str], input: str | None = None, **_: Any) -> Any:
        """Be ``subprocess.run`` of a kubectl."""
        try:
            with self.open() as state:
                out, err = _fault(state, command[1:], lambda: answer(state, _options(command[1:]), input))
            return SimpleNamespace(returncode=int(out == "no\n"), stdout=out, stderr=err)
        except Refusal as refusal:
            return SimpleNamespace(returncode=1, stdout="", stderr=str(refusal))


def _options(arguments: list[str]) -> list[str]:
    while arguments[0] in ("--context", "--namespace"):
        arguments = arguments[2:]
    return arguments


def _fault(state: Object, arguments: list[str], do: Any) -> tuple[str, str]:
    state["calls"].append(" ".join(arguments)[:200])
    for fault in state.get("faults", []):
        due = len(state["calls"]) > fault.get("from", 0) and fault.get("times", 1) > 0
        if fault["match"] in " ".join(arguments) and due:
            fault["times"] = fault.get("times", 1) - 1
            if fault.get("after"):
                do()
            if fault["stderr"] == "no" and "can-i" in arguments:
                return "no\n", ""
            raise Refusal(fault["stderr"])
    return do()


def answer(state: Object, arguments: list[str], given: str | None) -> tuple[str, str]:
    """Carry a call out: its stdout and stderr."""
    verb, *rest = arguments
    if verb == "api-resources":
        group = rest[0].partition("=")[2]
        return ("" if group in state.get("lacks", []) else f"things.{group}\n"), ""
    if verb == "config":
        own = {"namespace": state["namespace"]} if "namespace" in state else {}
        name = state.get("context", "scripted")
        return json.dumps({"current-context": name, "contexts": [{"name": name, "context": own}]}), ""
    if verb == "auth":
        return ("no\n" if f"{rest[1]} {rest[2]}" in state.get("denied", []) else "yes\n"), ""
    if verb in ("create", "apply"):
        return _create(state, json.loads(given or ""), rehearsed="--dry-run=server" in rest)
    if verb == "get" and rest[0] == "--raw":
        return "ok", ""
    if verb == "get":
        return json.dumps(_get(state, rest)), ""
    if verb == "delete":
        return _delete(state, rest[0], [name for name in rest[1:] if not name.startswith("-")])
    raise Refusal(f'error: unknown command "{verb}"')


def _create(state: Object, body: Object, rehearsed: bool) -> tuple[str, str]:
    for one in body["items"]:
        group = one["apiVersion"].rpartition("/")[0]
        if group in state.get("lacks", []):
            raise Refusal(f'error: resource mapping not found: no matches for kind "{one["kind"]}"')
        key = f"{one['kind']}/{one['metadata']['name']}"
        known = state["objects"].get(key)
        if rehearsed and known:
            raise Refusal(f'Error from server (AlreadyExists): "{key}" already exists')
        if not rehearsed and known and known["spec"] != one["spec"]:
            name = one["metadata"]["name"]
            raise Refusal(f'The {one["kind"]} "{name}" is invalid: spec.template: Invalid value: field is immutable')
        if not rehearsed and not known:
            uid = f"uid-{len(state['made'])}"
            state["objects"][key] = {**one, "metadata": {**one["metadata"], "uid": uid}, "status": {}}
            state["made"].append(key)
    return "", state.get("warning", "") if rehearsed else ""


def _get(state: Object, rest: list[str]) -> Object:
    kinds = [KINDS.get(kind.partition(".")[0].rstrip("s"), kind) for kind in rest[0].split(",")]
    if "-l" in rest:
        if "Pod" in kinds:
            step(state)
        wanted = dict(part.split("=") for part in rest[rest.index("-l") + 1].split(","))
        found = [o for o in state["objects"].values() if o["kind"] in kinds]
        return {"items": [o for o in found if wanted.items() <= o["metadata"].get("labels", {}).items()]}
    if "--field-selector" in rest:
        name = re.search(r"involvedObject.name=([^,]+)", " ".join(rest))[1]  # type: ignore[index]
        number = next(iter(o["metadata"]["labels"].get("blockwright.dev/job") for o in _named(state, name)), None)
        events = [e for n, e in state.get("events", {}).items() if n in (name, f"pods of {number}")]
        return {"items": [e if isinstance(e, dict) else {"reason": "FailedCreate", "message": e} for e in events]}
    kind, name = kinds[0], rest[1]
    if kind == "namespace" and name in state.get("missing", []):
        raise Refusal(f'Error from server (NotFound): namespaces "{name}" not found')
    if name in state.get("forbidden", []):
        raise Refusal(f'Error from server (Forbidden): {rest[0]} "{name}" is forbidden: User cannot get resource')
    if kind in KINDS.values():
        if found := state["objects"].get(f"{kind}/{name}"):
            return found
    elif kind == "namespace":
        return {"kind": "Namespace", "metadata": {"name": name, "uid": state.get("uid", "here")}}
    elif name not in state.get("missing", []):
        return {"kind": kind, "metadata": {"name": name}, "spec": state.get("specs", {}).get(name, {})}
    raise Refusal(f'Error from server (NotFound): {rest[0]} "{name}" not found')


def _delete(state: Object, kind: str, names: list[str]) -> tuple[str, str]:
    wanted = KINDS[kind.partition(".")[0].rstrip("s")]
    for name in names:
        if name in state.get("stuck", []):
            for one in [state["objects"][f"{wanted}/{name}"], *pods_of(state, _named(state, name)[0])]:
                one["metadata"]["deletionTimestamp"] = stamp(0)
                one["spec"]["nodeName"] = "n7"
            continue
        state["objects"].pop(f"{wanted}/{name}", None)
        state["deleted"].append(f"{wanted}/{name}")
        for key in [k for k, o in state["objects"].items() if _owned(o, name)]:
            del state["objects"][key]
    return "", ""


def _owned(one: Object, name: str) -> bool:
    owners = one["metadata"].get("ownerReferences", [])
    return one.get("owner") == name or any(owner["name"] == name for owner in owners)


def _named(state: Object, name: str) -> list[Object]:
    return [o for o in state["objects"].values() if o["metadata"]["name"] == name]


# The controllers


def step(state: Object) -> None:
    """A moment: pods are made, start, and end; Jobs and JobSets answer to it."""
    state["clock"] += 1
    for one in [o for o in state["objects"].values() if o["kind"] in ("Job", "JobSet", "TrainJob")]:
        if not one["status"].get("conditions") and not one["spec"].get("suspend"):
            _reconcile(state, one)


def pods_of(state: Object, one: Object) -> list[Object]:
    return [o for o in state["objects"].values() if o["kind"] == "Pod" and o["owner"] == one["metadata"]["name"]]


def job_of(one: Object) -> Object:
    """The spec of a Job, or of the one in a JobSet."""
    return one["spec"] if one["kind"] == "Job" else one["spec"]["replicatedJobs"][0]["template"]["spec"]


def _reconcile(state: Object, one: Object) -> None:
    spec, number = job_of(one), one["metadata"]["labels"]["blockwright.dev/job"]
    attempt = one["status"].setdefault("attempts", 0)
    current = [p for p in pods_of(state, one) if p["attempt"] == attempt]
    if not current:
        if number not in state.get("podless", []) and one["metadata"]["name"] not in state.get("alive", []):
            for index in range(spec["completions"]):
                _make_pod(state, one, spec, index, attempt)
        return
    for pod in [] if "alive" in state else current:
        _advance(state, pod, number, attempt)
    ends = [p["status"]["containerStatuses"][0]["state"]["terminated"] for p in current if _ended(p)]
    bad = next((p for p in current if _ended(p) and _code(p) != 0), None)
    if bad is not None:
        _failed(state, one, spec, bad, current)
    elif len(ends) == spec["completions"]:
        _conclude(one, "Complete" if one["kind"] == "Job" else "Completed", "CompletionsReached", "")


def _ended(pod: Object) -> bool:
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def _code(pod: Object) -> int:
    return pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]


def _make_pod(state: Object, one: Object, spec: Object, index: int, attempt: int) -> None:
    name = f"{one['metadata']['name']}-{index}-{state['clock']:05d}"
    metadata = {
        "name": name,
        "labels": spec["template"]["metadata"]["labels"],
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        "creationTimestamp": stamp(state["since"] + state["clock"]),
    }
    pod = {"kind": "Pod", "owner": one["metadata"]["name"], "index": index, "attempt": attempt, "metadata": metadata}
    state["objects"][f"Pod/{name}"] = {**pod, "spec": spec["template"]["spec"], "status": {"phase": "Pending"}}


def stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _advance(state: Object, pod: Object, number: str, attempt: int) -> None:
    status, waits = pod["status"], state.get("pending", {}).get(number)
    if status["phase"] == "Pending" and waits:
        waiting = {"state": {"waiting": {"reason": waits, "message": "as scripted"}}}
        unschedulable = {"type": "PodScheduled", "status": "False", "reason": waits, "message": "as scripted"}
        status |= {"conditions": [unschedulable]} if waits == "Unschedulable" else {"containerStatuses": [waiting]}
    elif status["phase"] == "Pending":
        status |= {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
    elif status["phase"] == "Running":
        scripted = state.get("outcomes", {}).get(number, [{"code": 0}])
        outcome = scripted[min(attempt, len(scripted) - 1)]
        if outcome.get("index", pod["index"]) != pod["index"]:
            return  # waits for its peers
        end(pod, **outcome)


def end(pod: Object, code: int = 0, message: str = "", reason: str = "", disrupted: str = "", index: int = 0) -> None:
    """End a pod's container."""
    why = reason or ("Error" if code else "Completed")
    state = {"terminated": {"exitCode": code, "message": message[:4096], "reason": why}}
    pod["status"] |= {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"state": state}]}
    if disrupted:
        pod["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": disrupted}]


def _failed(state: Object, one: Object, spec: Object, pod: Object, current: list[Object]) -> None:
    """What a controller does about a failed pod."""
    name, code = pod["metadata"]["name"], _code(pod)
    action, why = _rule(spec["podFailurePolicy"]["rules"], pod)
    message = f"Container train for pod default/{name} failed with exit code {code} matching {action} rule"
    if why == "disrupted":
        message = f"Pod default/{name} has condition DisruptionTarget matching {action} rule"
    if one["kind"] == "JobSet":
        failure = ("PodFailurePolicy", message) if action == "FailJob" else ("BackoffLimitExceeded", "Job has reached")
        return _set_failed(state, one, *failure)
    if action == "FailJob":
        return _conclude(one, "Failed", "PodFailurePolicy", message)
    counted = one["status"].get("failed", 0) + (action == "Count")
    one["status"]["failed"] = counted
    if counted > spec["backoffLimit"]:
        return _conclude(one, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    one["status"]["attempts"] += 1


def _rule(rules: list[Object], pod: Object) -> tuple[str, str]:
    for rule in rules:
        if codes := rule.get("onExitCodes"):
            if (_code(pod) in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"], "code"
        elif any(c["type"] == "DisruptionTarget" for c in pod["status"].get("conditions", [])):
            return rule["action"], "disrupted"
    return "Count", "code"


def _set_failed(state: Object, one: Object, reason: str, message: str) -> None:
    policy = one["spec"]["failurePolicy"]
    action = "RestartJobSet"
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(re.search(p, message) for p in patterns):
            action = rule["action"]
            break
    if action == "FailJobSet":
        return _conclude(one, "Failed", "FailJobSetFailurePolicyAction", f"applying FailJobSet: {message}")
    counted = one["status"].get("restartsCountTowardsMax", 0) + (action == "RestartJobSet")
    one["status"]["restartsCountTowardsMax"] = counted
    if counted > policy["maxRestarts"]:
        return _conclude(one, "Failed", "ReachedMaxRestarts", "jobset failed due to reaching max number of restarts")
    one["status"]["attempts"] += 1
    for pod in pods_of(state, one):  # BlockingRecreate: all of them go
        del state["objects"][f"Pod/{pod['metadata']['name']}"]


def _conclude(one: Object, kind: str, reason: str, message: str) -> None:
    one["status"]["conditions"] = [{"type": kind, "status": "True", "reason": reason, "message": message}]


def _logs(cluster: ScriptedCluster, arguments: list[str]) -> int:
    """``kubectl logs --follow --timestamps POD``: some lines a call, as a stream that breaks."""
    since = next((a.partition("=")[2] for a in arguments if a.startswith("--since-time=")), "")
    pod = next(a for a in arguments[1:] if not a.startswith("-"))
    with cluster.open() as state:
        lines = [line for line in state.get("logs", {}).get(pod, []) if line.partition(" ")[0] >= since]
        if pod not in state.get("logs", {}):
            print(f'Error from server (NotFound): pods "{pod}" not found', file=sys.stderr)
            return 1
        state.setdefault("opened", []).append(since)
    for line in lines[: state.get("lines_a_stream", 100)]:
        print(line)
    return 0


def main() -> int:
    cluster = ScriptedCluster(Path(os.environ["SCRIPTED_CLUSTER"]))
    arguments = _options(sys.argv[1:])
    if arguments[0] == "logs":
        return _logs(cluster, arguments)
    done = cluster.run(["kubectl", *arguments], sys.stdin.read() if "-f" in arguments else None)
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
