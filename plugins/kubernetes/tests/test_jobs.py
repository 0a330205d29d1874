"""The launcher's work against a scripted cluster, in this process."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_cluster import ScriptedCluster
from wrong_manifests import IMAGE

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.table import rows_of
from blockwright.plugins.kubernetes import cluster as clusters
from blockwright.plugins.kubernetes import jobs as jobs_module
from blockwright.plugins.kubernetes import watch
from blockwright.plugins.kubernetes.cluster import Cluster
from blockwright.plugins.kubernetes.jobs import Jobs, follow
from blockwright.plugins.kubernetes.launch import with_grace
from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.pod import message
from blockwright.plugins.kubernetes.preflight import needs, rehearse, settle
from blockwright.plugins.kubernetes.render import render
from blockwright.registry import ConfigError
from blockwright.training.result import Result
from blockwright.training.writing import write_json

SWEEP = "0a1b2c3d"


class InMemory(ScriptedCluster):
    """Without its file, for many."""

    def __init__(self, **state: Any) -> None:
        self.kept = {"objects": {}, "made": [], "calls": [], "clock": 0, "deleted": [], "since": time.time(), **state}

    @contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        yield self.kept


class Swept:
    """A sweep of some jobs on a scripted cluster."""

    def __init__(self, folder: Path, **state: Any) -> None:
        self.cluster, self.folder, self.said, self.ended = ScriptedCluster(folder / "cluster"), folder / "sweep", [], []
        self.folder.mkdir()
        self.shown: list[Any] = []
        self.started = 0  # calls before the first look
        self.set(**state)

    def set(self, **state: Any) -> None:
        with self.cluster.open() as known:
            known |= state

    def state(self) -> dict[str, Any]:
        with self.cluster.open() as known:
            return known

    @property
    def client(self) -> Cluster:
        return Cluster(run=self.cluster.run, say=self.said.append)

    def run(self, count: int = 1, signals: list[int] | None = None, **options: Any) -> dict[int, Result]:
        given = Options(image=IMAGE, **options)
        made = {n: render(given, "train", SWEEP, n, "/runs/x", [f"seed={n}"]) for n in range(count)}
        jobs = Jobs(self.client, SWEEP, given.made_as, self.folder, True, self.shown.append)
        jobs.run(made, given, self.ended.append, signals if signals is not None else [])
        return {n: Result.read(self.folder / str(n)) for n in range(count)}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "TICK_S", 0)
    monkeypatch.setattr(jobs_module, "LONGEST_S", 0)
    monkeypatch.setattr(jobs_module, "UNSEEN_S", 0)
    monkeypatch.setattr(clusters, "WAITS_S", (0, 0, 0))


@pytest.fixture
def swept(tmp_path: Path) -> Callable[..., Swept]:
    return lambda **state: Swept(tmp_path, **state)


def said(value: float, code: int = 0, **more: Any) -> dict[str, Any]:
    return {"code": code, "message": message(Result("completed", metrics={"val/loss": value}, **more), code)}


def test_jobs_are_created_a_few_at_a_time_and_read(swept: Callable[..., Swept]) -> None:
    sweep = swept(outcomes={str(n): [said(n / 3)] for n in range(5)})
    results = sweep.run(5, parallel=2)
    assert [results[n].metrics["val/loss"] for n in range(5)] == [n / 3 for n in range(5)]
    assert sorted(sweep.ended) == list(range(5))
    state = sweep.state()
    assert state["made"] == [f"Job/train-{SWEEP}-{n}" for n in range(5)]
    lists = [i for i, call in enumerate(state["calls"]) if call.startswith("apply")]
    assert lists[2] - lists[1] > 1  # the third waited until there was room


@pytest.mark.parametrize("nodes", [1, 2])
def test_exit_codes_mean_what_they_mean_here(swept: Callable[..., Swept], nodes: int) -> None:
    evicted = {"code": 137, "disrupted": "EvictionByEvictionAPI", "index": nodes - 1}
    outcomes = {
        "0": [{"code": 75}, {"code": 75}, evicted, said(1.0)],  # more than restarts: none counts
        "1": [{"code": 137}, said(2.0)],
        "2": [{"code": 64, "message": message(Result("failed", reason="model.x = 1: no. Write 2"), 64)}],
        "3": [{"code": 70, "message": message(Result("diverged", reason="loss is nan"), 70)}],
        "4": [{"code": 1, "message": "Traceback\nKeyError: 'x'"}],
        "5": [{"code": 137, "reason": "OOMKilled"}],
    }
    sweep = swept(outcomes=outcomes)
    results = sweep.run(6, restarts=1, nodes=nodes)
    assert [results[n].status for n in range(6)] == [*["completed"] * 2, "failed", "diverged", *["failed"] * 2]
    reasons = [results[n].reason for n in range(6)]
    assert reasons[2] == "model.x = 1: no. Write 2" and reasons[3] == "loss is nan"
    assert "KeyError" in reasons[4] or "max number of restarts" in reasons[4]
    assert "out of memory" in reasons[5] or "max number of restarts" in reasons[5]
    objects = sweep.state()["objects"].values()
    attempts = {o["metadata"]["name"][-1]: o["status"]["attempts"] for o in objects if "attempts" in o["status"]}
    assert attempts == {"0": 3, "1": 1, "2": 0, "3": 0, "4": 1, "5": 1}


def test_second_launcher_attaches_and_creates_nothing(swept: Callable[..., Swept]) -> None:
    sweep = swept(outcomes={"0": [said(0.5)], "1": [said(0.25)]})
    for _ in range(4):  # each is killed after some calls
        jobs = Jobs(sweep.client, SWEEP, "job", sweep.folder, shared=True)
        jobs.look()
        made = {n: render(Options(image=IMAGE), "train", SWEEP, n, "/runs/x", [f"seed={n}"]) for n in range(2)}
        for n in range(2):
            jobs.cluster.create(made[n])  # again and again
    results = sweep.run(2)
    assert [results[n].metrics["val/loss"] for n in range(2)] == [0.5, 0.25]
    assert sorted(sweep.state()["made"]) == [f"Job/train-{SWEEP}-{n}" for n in range(2)]


def test_other_options_under_the_same_name_are_refused(swept: Callable[..., Swept]) -> None:
    sweep = swept()
    sweep.client.create(render(Options(image=IMAGE), "train", SWEEP, 0, "/runs/x", []))
    with pytest.raises(ConfigError, match="exists with other options"):
        sweep.client.create(render(Options(image=IMAGE, memory="1Gi"), "train", SWEEP, 0, "/runs/x", []))


@pytest.mark.parametrize(
    "words",
    [
        "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?",
        "Unable to connect to the server: net/http: TLS handshake timeout",
        "Error from server (InternalError): an error on the server",
        "error: etcdserver: leader changed",
    ],
)
def test_errors_that_pass_are_waited_out(swept: Callable[..., Swept], words: str) -> None:
    sweep = swept(outcomes={"0": [said(1.0)]})
    sweep.set(
        faults=[{"match": "get", "stderr": words, "times": 2}, {"match": "apply", "stderr": words, "after": True}]
    )
    assert sweep.run()[0].metrics == {"val/loss": 1.0}
    assert sweep.state()["made"] == [f"Job/train-{SWEEP}-0"]
    assert any("does not answer" in line for line in sweep.said)


def test_call_without_an_answer_is_tried_again() -> None:
    import subprocess

    calls = []

    def hangs(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        calls.append(given["timeout"])
        if len(calls) < 3:
            raise subprocess.TimeoutExpired(command, given["timeout"])
        return subprocess.CompletedProcess(command, 0, "{}", "")

    assert Cluster(run=hangs, say=lambda line: None).get("pods") == {}
    assert len(calls) == 3 and None not in calls


@pytest.mark.parametrize("waits", ["ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError", "Unschedulable"])
def test_pod_that_cannot_start_is_reported_and_given_up(swept: Callable[..., Swept], waits: str) -> None:
    sweep = swept(pending={"0": waits}, outcomes={"1": [said(1.0)]})
    results = sweep.run(2, start_deadline_s=0)
    line = next(line for line in sweep.said if waits in line)
    assert ("Remedy: " in line and "hydra.launcher" in line) or "gpus" in line
    assert results[0].status == "failed" and waits in results[0].reason
    assert results[1].status == "completed"
    assert sweep.state()["deleted"] == [f"Job/train-{SWEEP}-0"]


def test_job_whose_pods_are_forbidden_is_reported(swept: Callable[..., Swept]) -> None:
    sweep = swept(podless=["0"], events={f"train-{SWEEP}-0": "Error creating: pods is forbidden: exceeded quota"})
    reason = sweep.run(start_deadline_s=0)[0].reason
    assert "FailedCreate" in reason and "exceeded quota" in reason


def test_live_table_shows_what_each_job_waits_for(swept: Callable[..., Swept]) -> None:
    sweep = swept(outcomes={"0": [{"code": 75}, said(1.0)]}, pending={"1": "ImagePullBackOff"})
    signals: list[int] = []
    sweep.ended = type("", (list,), {"append": lambda self, n: signals.append(15)})()
    now = time.monotonic()
    sweep.run(2, signals)
    first, last = [[(number, text) for number, text, _ in rows] for rows in (sweep.shown[1], sweep.shown[-1])]
    assert [number for number, _ in first] == [0, 1] and [number for number, _ in last] == [1]
    states = [text for rows in sweep.shown for number, text, _ in rows if number == 0]
    stopped = states.index("failed; exit 75 (stopped, its state saved)")
    assert "running" in states[:stopped] and "running" in states[stopped:]  # in another pod
    assert "ImagePullBackOff" in last[0][1] and "Remedy" in last[0][1]
    assert all(now - 1 <= since <= time.monotonic() for rows in sweep.shown for _, _, since in rows)


def test_status_gives_the_reason_of_a_waiting_job(swept: Callable[..., Swept]) -> None:
    sweep = swept(
        pending={"0": "Unschedulable"},
        podless=["1"],
        events={f"train-{SWEEP}-1": "exceeded quota: gpus"},
        outcomes={"3": [{"index": 1}], "4": [said(1.0)]},  # job 3 runs on
    )
    for n in range(5):
        (one,) = render(Options(image=IMAGE), "train", SWEEP, n, "/runs/x", [])
        one["spec"] |= {"suspend": True} if n == 2 else {}
        sweep.client.create([one])
    jobs = Jobs(sweep.client, SWEEP, "job", sweep.folder)
    for _ in range(4):
        states = jobs.collect()
    assert {n: state["status"] for n, state in states.items()} == {**dict.fromkeys(range(3), "waiting"), 3: "running"}
    assert "Unschedulable" in states[0]["reason"] and "Remedy" in states[0]["reason"]
    assert "exceeded quota" in states[1]["reason"] and states[2]["reason"] == "waits in its queue"
    plan = {"kind": "grid", "metric": "val/loss", "direction": "minimize"}
    plans.write(sweep.folder, {**plan, "jobs": [{"job": n, "overrides": [f"seed={n}"]} for n in range(6)]})
    rows = rows_of(sweep.folder, states)
    assert [row["status"] for row in rows] == [*["waiting"] * 3, "running", "completed", "unfinished"]
    assert [row["reason"] for row in rows[:4]] == [states[n]["reason"] for n in range(4)]


def test_queued_job_is_not_given_up(swept: Callable[..., Swept]) -> None:
    sweep = swept()
    given = Options(image=IMAGE, queue="team", start_deadline_s=0)
    made = {0: render(given, "train", SWEEP, 0, "/runs/x", [])}
    made[0][-1]["spec"]["suspend"] = True  # as Kueue does
    signals: list[int] = []
    looked = 0

    def say(line: str) -> None:
        nonlocal looked
        looked += 1
        if "queue" in line:
            signals.append(15)

    Jobs(Cluster(run=sweep.cluster.run, say=say), SWEEP, "job", sweep.folder).run(
        made, given, sweep.ended.append, signals
    )
    assert looked == 2 and not sweep.ended and not sweep.state()["deleted"]


def test_stop_deletes_what_runs_and_reads_what_has_ended(swept: Callable[..., Swept]) -> None:
    sweep = swept(outcomes={"0": [said(1.0)]}, pending={"1": "Unschedulable"})
    signals: list[int] = []
    sweep.ended = type("", (list,), {"append": lambda self, n: signals.append(15)})()  # at the first end
    sweep.run(2, signals)
    assert Jobs(sweep.client, SWEEP, "job", sweep.folder).stop() == ([], [1])
    assert Result.read(sweep.folder / "0").metrics == {"val/loss": 1.0}
    assert sweep.state()["deleted"] == [f"Job/train-{SWEEP}-1"]


LINES = [
    ({"conditions": [("DisruptionTarget", "True", "PreemptionByScheduler")]}, "preempted by a pod of higher priority"),
    ({"conditions": [("DisruptionTarget", "True", "DeletionByTaintManager")]}, "its node is lost"),
    ({"conditions": [("DisruptionTarget", "True", "TerminationByKubelet")]}, "short of memory"),
    ({"end": (137, "OOMKilled")}, "out of memory"),
    ({"end": (75, "Error")}, "its state saved"),
    ({"gone": "2026-11-26T00:00:00Z"}, "does not answer"),
    ({"gone": "2099-01-01T00:00:00Z"}, "is being stopped"),
]


@pytest.mark.parametrize(("given", "words"), LINES, ids=[w for _, w in LINES])
def test_what_happens_to_a_pod_is_named(given: dict[str, Any], words: str) -> None:
    conditions = [{"type": t, "status": s, "reason": r} for t, s, r in given.get("conditions", [])]
    status: dict[str, Any] = {"phase": "Running", "conditions": conditions}
    if "end" in given:
        terminated = {"exitCode": given["end"][0], "reason": given["end"][1]}
        status["containerStatuses"] = [{"state": {"terminated": terminated}}]
    metadata = {"name": "p", **({"deletionTimestamp": given["gone"]} if "gone" in given else {})}
    now = watch.seconds("2026-11-26T01:00:00Z")
    assert words in watch.line({"metadata": metadata, "spec": {"nodeName": "n1"}, "status": status}, now)


def test_results_of_a_failed_second_node_are_its_own() -> None:
    def pod(index: int, code: int, text: str) -> dict[str, Any]:
        terminated = {"exitCode": code, "message": text, "reason": "Error"}
        labels = {watch.INDEX: str(index)}
        return {
            "metadata": {"labels": labels},
            "status": {"containerStatuses": [{"state": {"terminated": terminated}}]},
        }

    found = watch.results("failed", "Policy: x", [pod(0, 75, '{"code": 75, "status": "stopped"}'), pod(1, 1, "boom")])
    assert found["status"] == "failed" and found["reason"] == "boom"


def test_log_is_whole_and_without_repeats_across_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubectl: Path
) -> None:
    cluster = ScriptedCluster(kubectl)
    stamps = ["01", "02", "02", "02", "03", "04"]  # several lines of one moment
    lines = [f"2026-11-26T00:00:{s}Z line {i}" for i, s in enumerate(stamps)]
    with cluster.open() as state:
        state |= {"logs": {"p": lines}, "lines_a_stream": 4}
        status = {"containerStatuses": [{"state": {"terminated": {"exitCode": 0}}}]}
        state["objects"]["Pod/p"] = {"kind": "Pod", "metadata": {"name": "p"}, "status": status, "owner": ""}

    def ended(self: Cluster, kind: str, name: str) -> dict[str, Any]:
        with cluster.open() as state:
            return state["objects"]["Pod/p"] if len(state["opened"]) > 3 else {"status": {}}

    monkeypatch.setattr(Cluster, "get", ended)
    follow(Cluster(), "p", tmp_path / "0" / "job.log", pause_s=0)
    assert (tmp_path / "0" / "job.log").read_text() == "".join(f"line {i}\n" for i in range(6))
    assert json.loads(cluster.file.read_text())["opened"][0] == ""


@pytest.mark.parametrize(
    ("given", "measured", "grace", "words"),
    [
        (None, [], None, None),
        (None, [None], None, None),  # a job without saves
        (None, [2.0, 50.5], 152, "took 50.5 s: pods have 152 s"),
        (None, [2.0], 60, "pods have 60 s"),
        (300, [50.5], 300, None),
        (100, [50.5], 100, "grace_s=152 would be safer than 100"),
    ],
    ids=str,
)
def test_grace_period_is_three_times_the_slowest_save(
    given: int | None, measured: list[float | None], grace: int | None, words: str | None, tmp_path: Path
) -> None:
    for number, seconds in enumerate(measured):
        (tmp_path / str(number)).mkdir()
        found = {"status": "completed", **({"save_seconds": seconds} if seconds else {})}
        write_json(tmp_path / str(number) / "results.json", found)
    lines: list[str] = []
    assert with_grace(Options(image=IMAGE, grace_s=given), tmp_path, lines.append).grace_s == grace
    assert len(lines) == (words is not None) and (words or "") in "".join(lines)
    (job,) = render(Options(image=IMAGE, grace_s=grace), "train", SWEEP, 0, "/runs/x", [])
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == (grace or 120)


# Preflight


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"missing": ["runs"]}, {}, "claim", "no persistentvolumeclaim"),
    ({"missing": ["corpora"]}, {"volumes": {"corpora": "/c"}}, "volumes", "no persistentvolumeclaim"),
    ({"specs": {"runs": {"accessModes": ["ReadWriteOnce"]}}}, {"nodes": 2}, "claim", "one machine"),
    ({"missing": ["wandb"]}, {"secrets": ["wandb"]}, "secrets", "no secret"),
    ({"missing": ["team"]}, {"queue": "team"}, "queue", "no localqueues"),
    ({"missing": ["nope"]}, {"priority": "nope"}, "priority", "no priorityclass"),
    ({"missing": ["blockwright"]}, {"kind": "trainjob"}, "runtime", "no clustertrainingruntimes"),
    ({"lacks": ["jobset.x-k8s.io"]}, {"kind": "jobset"}, "kind", "has no jobset"),
    ({"lacks": ["trainer.kubeflow.org"]}, {"kind": "trainjob"}, "kind", "has no trainjob"),
    ({"denied": ["create jobs.batch"]}, {}, "namespace", "may not create"),
    ({"denied": ["get pods"]}, {}, "namespace", "may not get pods"),
    ({"warning": 'Warning: would violate PodSecurity "restricted:latest": x'}, {}, "namespace", "never start"),
]
KLOG = 'E1128 10:00:00.1 123 memcache.go:265] "Unhandled Error" err="Get \\"https://h:6443/api\\": connection refused"'
WORDS = {
    "error: You must be logged in to the server (Unauthorized)": ("context", "login has expired"),
    "error: current-context is not set": ("context", "knows no cluster"),
    "The connection to the server localhost:8080 was refused": ("context", "knows no cluster"),
    'error: context "prod" does not exist': ("context", "no context"),
    "Unable to connect to the server: x509: certificate signed by unknown authority": ("context", "not valid"),
    'Error from server (NotFound): namespaces "team" not found': ("namespace", "does not exist"),
    'Error from server (Forbidden): jobs.batch is forbidden: User "x" cannot create': ("namespace", "may not"),
    'Error from server (Forbidden): pods "a" is forbidden: exceeded quota: gpus': ("parallel", "quota"),
    'Error from server (BadRequest): strict decoding error: unknown field "spec.x"': ("", "refuses the manifest"),
    "Error from server (ServiceUnavailable): the server is currently unable to handle": ("context", "does not answer"),
    f'{KLOG}\nerror: the server doesn\'t have a resource type "jobsets"': ("context", "does not answer"),
    f'{KLOG}\nError from server (Forbidden): jobs.batch is forbidden: User "x" cannot': ("namespace", "may not"),
}


def _preflight(sweep: Swept, **options: Any) -> None:
    given = settle(sweep.client, Options(image=IMAGE, **options))
    needs(sweep.client, given)
    rehearse(sweep.client, render(given, "train", SWEEP, 0, "/runs/x", []))


def _refused(sweep: Swept, option: str, words: str, **options: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        _preflight(sweep, **options)
    assert refused.value.path == f"hydra.launcher{f'.{option}' if option else ''}"
    assert words in refused.value.rule and refused.value.remedy
    assert not sweep.state()["made"]


@pytest.mark.parametrize(("state", "options", "option", "words"), MISTAKES, ids=str)
def test_what_pods_refer_to_must_exist(
    swept: Callable[..., Swept], state: dict[str, Any], options: dict[str, Any], option: str, words: str
) -> None:
    sweep = swept(**state)
    _refused(sweep, option, words, **options)
    sweep.set(missing=[], specs={}, lacks=[], denied=[], warning="")
    _preflight(sweep, **options)


@pytest.mark.parametrize("words", WORDS)
def test_what_kubectl_says_becomes_one_message(swept: Callable[..., Swept], words: str) -> None:
    sweep = swept(faults=[{"match": "", "stderr": words, "times": 99}])
    _refused(sweep, *WORDS[words])


def test_missing_kubectl_is_refused() -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    for call in (Cluster(run=missing).call, Cluster(run=missing).follow):
        with pytest.raises(ConfigError, match="kubectl, which is not installed"):
            call("logs")
    with pytest.raises(ConfigError, match="kubectl, which is not installed"):
        settle(Cluster(run=missing), Options(image=IMAGE))  # type: ignore[arg-type]


def test_secret_that_may_not_be_looked_at_is_believed(swept: Callable[..., Swept]) -> None:
    _preflight(swept(forbidden=["wandb"]), secrets=["wandb"])


def test_without_jobset_nodes_are_a_job_and_a_service_and_the_loss_is_named(
    swept: Callable[..., Swept],
) -> None:
    sweep = swept(lacks=["jobset.x-k8s.io"])
    assert settle(sweep.client, Options(image=IMAGE, nodes=2)).made_as == "job"
    assert "restart one by one" in sweep.said[-1]


def test_job_inside_a_jobset_is_rehearsed_too(swept: Callable[..., Swept]) -> None:
    sweep = swept(faults=[{"match": "", "stderr": "", "times": 0}])
    tried: list[str] = []
    client = sweep.client
    client.create = lambda made, rehearsed=False: tried.extend(m["kind"] for m in made) or ""  # type: ignore[method-assign,func-returns-value]
    rehearse(client, render(Options(image=IMAGE, nodes=2), "train", SWEEP, 0, "/runs/x", []))
    assert tried == ["JobSet", "Job"]


# What a real server does


@pytest.mark.parametrize("reason", ["FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", None])
def test_pod_that_stays_pending_is_reported_by_its_events_and_given_up(
    swept: Callable[..., Swept], reason: str | None
) -> None:
    events = {"pods of 0": {"reason": reason, "message": f"{'x' * 400} the cause"}} if reason else {}
    sweep = swept(pending={"0": "ContainerCreating"}, events=events, since=0)
    failed = sweep.run(start_deadline_s=0)[0]
    assert failed.status == "failed" and "given up after 0 s" in failed.reason
    assert (reason or "Pending") in failed.reason and "Remedy: " in failed.reason
    assert not reason or "the cause" in failed.reason
    assert [line for line in sweep.said if (reason or "Pending") in line]


def test_live_table_says_what_a_pod_waits_for(swept: Callable[..., Swept]) -> None:
    """Rather than that it is pending."""
    sweep = swept(pending={"0": "ContainerCreating"}, events={"pods of 0": {"reason": "FailedMount"}}, since=0)
    signals: list[int] = []
    rows: list[Any] = []

    class Shown(list[Any]):
        def append(self, shown: Any) -> None:
            rows.extend(shown)
            if any("Remedy: " in said for _, said, _ in shown) or len(rows) > 20:
                signals.append(15)

    sweep.shown = Shown()
    sweep.run(signals=signals)
    assert "FailedMount" in rows[-1][1] and "Remedy: " in rows[-1][1]


def test_pod_that_waits_for_a_moment_is_left_alone(swept: Callable[..., Swept]) -> None:
    sweep = swept(pending={"0": "ContainerCreating"})
    signals: list[int] = []
    sweep.shown = type("", (list,), {"append": lambda self, rows: signals.append(15) if rows else None})()
    assert not sweep.run(start_deadline_s=0, signals=signals)[0].ended
    assert not any("events" in call for call in sweep.state()["calls"])


def test_dead_node_has_a_remedy_that_ends_its_pods() -> None:
    pod = {"metadata": {"name": "p", "deletionTimestamp": "2026-11-26T00:00:00Z"}, "spec": {"nodeName": "n7"}}
    said_of_it = watch.line({**pod, "status": {"phase": "Running"}}, time.time())
    assert "kubectl taint node n7 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in said_of_it
    assert "--force" not in said_of_it


def test_server_that_is_away_for_long_is_waited_for(swept: Callable[..., Swept]) -> None:
    sweep = swept(outcomes={"0": [said(1.0)]})
    away = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
    sweep.set(faults=[{"match": "get jobs", "stderr": away, "times": 40}])
    assert sweep.run()[0].metrics == {"val/loss": 1.0}
    assert len([line for line in sweep.said if "jobs continue, and this waits for it" in line]) == 1


def test_signal_ends_the_waiting_for_a_server(swept: Callable[..., Swept]) -> None:
    sweep = swept()
    signals: list[int] = []
    sweep.said = type("", (list,), {"append": lambda self, line: signals.append(15)})()
    sweep.set(faults=[{"match": "get", "stderr": "Unable to connect to the server: EOF", "times": 10**6}])
    assert not sweep.run(signals=signals)[0].ended


def test_full_quota_means_no_room_yet(swept: Callable[..., Swept]) -> None:
    full = "Error from server (Forbidden): jobs.batch is forbidden: exceeded quota: n, requested: count/jobs.batch=1"
    sweep = swept(outcomes={str(n): [said(float(n))] for n in range(3)})
    sweep.set(faults=[{"match": "apply", "stderr": full, "times": 2}])
    results = sweep.run(3)
    assert [results[n].metrics["val/loss"] for n in range(3)] == [0.0, 1.0, 2.0]
    assert any("waits for room" in line for line in sweep.said)
    sweep.folder = sweep.folder.parent / "another"
    sweep.folder.mkdir()
    sweep.set(objects={}, faults=[{"match": "apply", "stderr": full, "times": 10**6}])
    assert "given up" in sweep.run(1, start_deadline_s=0)[0].reason


def test_service_is_its_jobs_and_goes_with_it(swept: Callable[..., Swept]) -> None:
    sweep = swept(pending={"0": "Unschedulable"})
    sweep.run(nodes=2, kind="job", start_deadline_s=0)
    state = sweep.state()
    assert [name.partition("/")[0] for name in state["made"]] == ["Job", "Service"]
    assert state["deleted"] and not state["objects"]


def test_service_that_a_killed_launcher_has_not_made_is_made(swept: Callable[..., Swept]) -> None:
    sweep = swept(outcomes={"0": [said(1.0)]})
    given = Options(image=IMAGE, nodes=2, kind="job")
    sweep.client.create(render(given, "train", SWEEP, 0, "/runs/x", ["seed=0"])[:1])
    assert sweep.run(nodes=2, kind="job")[0].status == "completed"
    (service,) = (o for o in sweep.state()["objects"].values() if o["kind"] == "Service")
    assert service["metadata"]["ownerReferences"][0]["uid"] == "uid-0"


def test_job_deleted_by_hand_is_not_made_again(swept: Callable[..., Swept]) -> None:
    sweep = swept(pending={"0": "Unschedulable"})

    class Deletes(list[Any]):
        def append(self, rows: Any) -> None:
            if rows:
                sweep.set(objects={})

    sweep.shown = Deletes()
    assert "deleted from the cluster" in sweep.run()[0].reason
    assert len(sweep.state()["made"]) == 1


def test_queue_without_kueue_is_refused(swept: Callable[..., Swept]) -> None:
    _refused(swept(lacks=["kueue.x-k8s.io"]), "queue", "would not queue", queue="team")


def test_namespace_that_is_not_there_is_no_missing_right(swept: Callable[..., Swept]) -> None:
    sweep = swept(missing=["trainign"], denied=["create jobs.batch"])
    with pytest.raises(ConfigError, match="does not exist") as refused:
        settle(dataclasses.replace(sweep.client, namespace="trainign"), Options(image=IMAGE))
    assert refused.value.path == "hydra.launcher.namespace" and refused.value.value == "trainign"


def test_what_may_not_be_read_is_said_not_to_be_checked(swept: Callable[..., Swept]) -> None:
    sweep = swept(forbidden=["wandb"])
    _preflight(sweep, secrets=["wandb"])
    assert "secret wandb is not checked: you may not read it" in sweep.said


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("exceeded quota: gpus", "parallel"),
        ('violates PodSecurity "restricted"', "capabilities"),
        ("no PriorityClass with name high was found", "priority"),
        ("failed quota: q: must specify limits.cpu for: train", "hydra.launcher.cpu"),
        ("maximum cpu usage per Container is 2", "limitranges"),
        ('admission webhook "x" denied the request', "its message says which"),
    ],
)
def test_pods_that_are_not_made_have_the_remedy_of_their_cause(message: str, remedy: str) -> None:
    assert remedy in watch.blocked("FailedCreate", f"pods is forbidden: {message}")
    assert "quota" not in remedy or "quota" in message


# Answers that a server gives for a while: any call of the launcher may meet one

FORBIDDEN = 'Error from server (Forbidden): jobs.batch is forbidden: User "x" cannot list resource "jobs"'
FOR_A_WHILE = {
    "403": FORBIDDEN,
    "refused": "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?",
    "500": "Error from server (InternalError): an error on the server",
    "429": "Error from server (TooManyRequests): the server has received too many requests",
}
AFTER_A_LOOK = {**FOR_A_WHILE, "401": "error: You must be logged in to the server (Unauthorized)"}


def _whole(sweep: Swept) -> dict[int, Result]:
    """All that a launcher asks of a cluster: what it checks first, two jobs with Services, one that cannot start."""
    options = {"nodes": 2, "kind": "job", "secrets": ["wandb"], "queue": "team"}
    asked = dataclasses.replace(sweep.client, namespace="team")
    asked.identity()
    given = settle(asked, Options(image=IMAGE, **options))
    needs(asked, given)
    rehearse(asked, render(given, "train", SWEEP, 0, "/runs/x", []))
    sweep.started = len(sweep.state()["calls"])
    return sweep.run(3, start_deadline_s=1, **options)


def _fresh(folder: Path, **more: Any) -> Swept:
    folder.mkdir()
    outcomes = {"0": [{"code": 75}, said(0.5)], "1": [said(0.25)]}
    events = {f"train-{SWEEP}-2": "Error creating: pods is forbidden: exceeded quota: n"}
    swept = Swept(folder)
    swept.cluster = InMemory(outcomes=outcomes, podless=["2"], events=events, **more)
    return swept


@pytest.mark.parametrize(
    ("answers", "every"), [(["403", "refused"], False), pytest.param([*AFTER_A_LOOK], True, marks=pytest.mark.slow)]
)
def test_no_call_ends_the_launcher_or_makes_a_job_twice_while_a_server_comes_back(
    answers: list[str], every: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three calls in a row, from each call on; in the quick form from the first of each kind."""
    clock = iter(range(10**9))
    monkeypatch.setattr(jobs_module.time, "time", lambda: 1e9 + next(clock) / 10)  # given up after some looks
    plain = _fresh(tmp_path / "plain")
    statuses = {n: result.status for n, result in _whole(plain).items()}
    calls = plain.state()["calls"]
    assert statuses == {0: "completed", 1: "completed", 2: "failed"}
    verbs = {word for call in calls for word in call.split()}
    assert verbs >= {"config", "api-resources", "auth", "events", "create", "apply", "delete"}
    kinds = {(n > plain.started, re.sub(r"train-\S*", "", call)): n for n, call in reversed([*enumerate(calls)])}
    for at in range(len(calls)) if every else sorted(kinds.values()):
        for name, after in itertools.product(answers, (False, True) if every else (False,)):
            if name not in FOR_A_WHILE and at <= plain.started:
                continue
            fault = {"match": "", "stderr": AFTER_A_LOOK[name], "from": at, "times": 3, "after": after}
            sweep = _fresh(tmp_path / f"{at} {name} {after}", faults=[fault])
            assert {n: result.status for n, result in _whole(sweep).items()} == statuses, (calls[at], name, after)
            made = sweep.state()["made"]
            assert len({*made}) == len(made) and {*made} <= {*plain.state()["made"]}, (calls[at], name, after)


def test_a_right_is_missing_only_when_a_ready_server_says_so_twice(swept: Callable[..., Swept]) -> None:
    sweep = swept(faults=[{"match": "can-i", "stderr": "no", "times": 1}])
    _preflight(sweep)
    sweep.set(faults=[{"match": "", "stderr": "no", "times": 2}])  # the question, and /readyz
    assert sweep.client.may("create", "jobs.batch")
    sweep.set(faults=[{"match": "can-i", "stderr": "no", "times": 10**6}])
    _refused(sweep, "namespace", "may not create")


def test_refusal_that_lasts_ends_the_launcher(swept: Callable[..., Swept], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = swept(faults=[{"match": "get jobs", "stderr": FORBIDDEN, "from": 3, "times": 10**6}])
    monkeypatch.setattr(jobs_module, "REFUSED_S", 0.05)
    with pytest.raises(ConfigError, match="you may not do this"):
        sweep.run()
    assert any("asks again" in line for line in sweep.said) and len(sweep.state()["made"]) == 1


def test_full_quota_is_no_refusal_of_a_rehearsal_and_hides_none(swept: Callable[..., Swept]) -> None:
    """The jobs of the sweep itself may fill it."""
    full = 'Error from server (Forbidden): jobs.batch "a" is forbidden: exceeded quota: n, requested: count/jobs=1'
    sweep = swept(faults=[{"match": "--dry-run", "stderr": full, "times": 1}])
    _preflight(sweep)
    wrong = 'Error from server (BadRequest): strict decoding error: unknown field "spec.x"'
    sweep.set(faults=[{"match": "--dry-run", "stderr": f"Warning: w\n{full}\n{wrong}\n{full}", "times": 1}])
    _refused(sweep, "", "refuses the manifest")


def test_job_that_its_ttl_may_have_deleted_unseen_is_made_again_once(
    swept: Callable[..., Swept], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = swept(outcomes={"0": [said(0.5)]})
    slept = [0.0]
    real = time.time
    monkeypatch.setattr(jobs_module.time, "time", lambda: real() + slept[0])

    class Deletes(list[Any]):
        left = 1

        def append(self, rows: Any) -> None:
            if rows and self.left:
                self.left -= 1
                slept[0] += 100  # a laptop that was closed
                sweep.set(objects={})

    sweep.shown = Deletes()
    assert sweep.run(ttl_s=60)[0].metrics == {"val/loss": 0.5}
    assert len(sweep.state()["made"]) == 2
    sweep.folder = sweep.folder.parent / "another"
    sweep.folder.mkdir()
    sweep.set(objects={}, made=[])
    sweep.shown = Deletes()
    sweep.shown.left = 2
    assert "ttl_s" in sweep.run(ttl_s=60)[0].reason
    assert len(sweep.state()["made"]) == 2


def test_stop_names_a_node_that_does_not_answer_and_leaves_its_job(swept: Callable[..., Swept]) -> None:
    sweep = swept(pending={"1": "Unschedulable"}, stuck=[f"train-{SWEEP}-0"], outcomes={"0": [{"index": 1}]})
    signals: list[int] = []
    sweep.shown = type("", (list,), {"append": lambda self, rows: signals.append(15) if len(rows) == 2 else None})()
    sweep.run(2, signals)
    assert Jobs(sweep.client, SWEEP, "job", sweep.folder).stop() == ([], [1])
    assert any("kubectl taint node n7" in line for line in sweep.said)
    assert any("is left" in line and f"train-{SWEEP}-0" in line for line in sweep.said)


def test_log_that_cannot_be_read_is_asked_for_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubectl: Path
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 8:
            raise InterruptedError

    broken = ("sh", "-c", "echo no node >&2; exit 1")
    monkeypatch.setattr(Cluster, "command", lambda self, *arguments: list(broken))
    monkeypatch.setattr(jobs_module.time, "sleep", sleep)
    with pytest.raises(InterruptedError):
        follow(Cluster(), "p", tmp_path / "0" / "job.log")
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_pods_that_are_not_made_are_reported_once(swept: Callable[..., Swept]) -> None:
    """Whatever the name is that each would have had."""
    sweep = swept(podless=["0"])

    class Tries(list[Any]):
        def append(self, rows: Any) -> None:
            super().append(rows)
            words = f'Error creating: pods "train-{len(self)}" is forbidden: failed quota: q: must specify limits.cpu'
            sweep.set(events={f"train-{SWEEP}-0": words})
            if len(self) > 6:
                signals.append(15)

    signals: list[int] = []
    sweep.shown = Tries()
    sweep.run(signals=signals)
    lines = [line for line in sweep.said if "must specify" in line]
    assert len(lines) == 1 and "hydra.launcher.cpu" in lines[0]


def test_what_may_not_be_read_is_said_once(swept: Callable[..., Swept]) -> None:
    sweep = swept(forbidden=["team"])
    asked = dataclasses.replace(sweep.client, namespace="team")
    asked.identity()
    settle(asked, Options(image=IMAGE))
    assert [line for line in sweep.said if "not checked" in line] == [
        "namespace team is not checked: you may not read it"
    ]
