"""The launcher's work against a scripted cluster, in this process."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
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
from blockwright.registry.folder import write_json
from blockwright.training.result import Result

SWEEP = "0a1b2c3d"
REFUSED = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
FULL = "Error from server (Forbidden): jobs.batch is forbidden: exceeded quota: n, requested: count/jobs.batch=1"
FORBIDDEN = 'Error from server (Forbidden): jobs.batch is forbidden: User "x" cannot list resource "jobs"'


class InMemory(ScriptedCluster):
    """Without its file, for many."""

    def __init__(self, **state: Any) -> None:
        self.kept = {"objects": {}, "made": [], "calls": [], "clock": 0, "deleted": [], "since": time.time(), **state}

    @contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        yield self.kept


class Then(list[Any]):
    """A list that calls a function with what is appended."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.call = call

    def append(self, one: Any) -> None:
        super().append(one)
        self.call(one)


class Swept:
    """A sweep of some jobs on a scripted cluster."""

    def __init__(self, folder: Path, **state: Any) -> None:
        self.cluster, self.folder = ScriptedCluster(folder / "cluster"), folder / "sweep"
        self.said, self.ended, self.shown, self.signals = [], [], [], []
        self.folder.mkdir()
        self.started = 0  # calls before the first look
        self.set(**state)

    def set(self, **state: Any) -> None:
        with self.cluster.open() as known:
            known |= state

    def state(self) -> dict[str, Any]:
        with self.cluster.open() as known:
            return known

    def stop(self, *_: Any) -> None:
        self.signals.append(15)

    def another(self, **state: Any) -> None:
        """The next run is of another sweep."""
        self.folder = self.folder.parent / "another"
        self.folder.mkdir()
        self.set(objects={}, made=[], **state)

    @property
    def client(self) -> Cluster:
        return Cluster(run=self.cluster.run, say=self.said.append)

    @property
    def jobs(self) -> Jobs:
        return Jobs(self.client, SWEEP, "job", self.folder)

    def run(self, count: int = 1, **options: Any) -> dict[int, Result]:
        given = Options(image=IMAGE, **options)
        made = {n: manifests(n, **options) for n in range(count)}
        jobs = Jobs(self.client, SWEEP, given.made_as, self.folder, True, self.shown.append)
        jobs.run(made, given, self.ended.append, self.signals)
        return {n: Result.read(self.folder / str(n)) for n in range(count)}

    def losses(self, count: int = 1, **options: Any) -> list[float]:
        return [result.metrics["val/loss"] for result in self.run(count, **options).values()]


def manifests(number: int = 0, **options: Any) -> list[dict[str, Any]]:
    return render(Options(image=IMAGE, **options), "train", SWEEP, number, "/runs/x", [f"seed={number}"])


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TICK_S", "LONGEST_S", "UNSEEN_S"):
        monkeypatch.setattr(jobs_module, name, 0)
    monkeypatch.setattr(clusters, "WAITS_S", (0, 0, 0))


Sweeps = Callable[..., Swept]


@pytest.fixture
def swept(tmp_path: Path) -> Sweeps:
    return lambda **state: Swept(tmp_path, **state)


def said(value: float, code: int = 0, **more: Any) -> dict[str, Any]:
    return {"code": code, "message": message(Result("completed", metrics={"val/loss": value}, **more), code)}


def test_jobs_are_created_a_few_at_a_time_and_read(swept: Sweeps) -> None:
    sweep = swept(outcomes={str(n): [said(n / 3)] for n in range(5)})
    assert sweep.losses(5, parallel=2) == [n / 3 for n in range(5)]
    assert sorted(sweep.ended) == list(range(5))
    state = sweep.state()
    assert state["made"] == [f"Job/train-{SWEEP}-{n}" for n in range(5)]
    lists = [i for i, call in enumerate(state["calls"]) if call.startswith("apply")]
    assert lists[2] - lists[1] > 1  # the third waited until there was room


@pytest.mark.parametrize("nodes", [1, 2])
def test_exit_codes_mean_what_they_mean_here(swept: Sweeps, nodes: int) -> None:
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


def test_second_launcher_attaches_creates_nothing_and_takes_no_other_options(swept: Sweeps) -> None:
    sweep = swept(outcomes={"0": [said(0.5)], "1": [said(0.25)]})
    for _ in range(4):  # each is killed after some calls
        sweep.jobs.look()
        for n in range(2):
            sweep.client.create(manifests(n))
    assert sweep.losses(2) == [0.5, 0.25]
    assert sorted(sweep.state()["made"]) == [f"Job/train-{SWEEP}-{n}" for n in range(2)]
    with pytest.raises(ConfigError, match="exists with other options"):
        sweep.client.create(manifests(memory="1Gi"))


PASSING = (
    REFUSED,
    "Unable to connect to the server: net/http: TLS handshake timeout",
    "Error from server (InternalError): an error on the server",
    "error: etcdserver: leader changed",
)


@pytest.mark.parametrize("words", PASSING)
def test_errors_that_pass_are_waited_out(swept: Sweeps, words: str) -> None:
    lost = {"match": "apply", "stderr": words, "after": True}
    sweep = swept(outcomes={"0": [said(1.0)]}, faults=[{"match": "get", "stderr": words, "times": 2}, lost])
    assert sweep.losses() == [1.0]
    assert sweep.state()["made"] == [f"Job/train-{SWEEP}-0"]
    assert any("does not answer" in line for line in sweep.said)


def test_call_without_an_answer_is_tried_again() -> None:
    calls = []

    def hangs(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        calls.append(given["timeout"])
        if len(calls) < 3:
            raise subprocess.TimeoutExpired(command, given["timeout"])
        return subprocess.CompletedProcess(command, 0, "{}", "")

    assert Cluster(run=hangs, say=lambda line: None).get("pods") == {}
    assert len(calls) == 3 and None not in calls


@pytest.mark.parametrize("waits", ["ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError", "Unschedulable"])
def test_pod_that_cannot_start_is_reported_and_given_up(swept: Sweeps, waits: str) -> None:
    sweep = swept(pending={"0": waits}, outcomes={"1": [said(1.0)]})
    results = sweep.run(2, start_deadline_s=0)
    assert any(waits in line and "Remedy: " in line for line in sweep.said)
    assert results[0].status == "failed" and waits in results[0].reason
    assert results[1].status == "completed"
    assert sweep.state()["deleted"] == [f"Job/train-{SWEEP}-0"]


@pytest.mark.parametrize("reason", ["FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", None])
def test_pod_that_stays_pending_is_reported_by_its_events_and_given_up(swept: Sweeps, reason: str | None) -> None:
    events = {"pods of 0": {"reason": reason, "message": f"{'x' * 400} the cause"}} if reason else {}
    sweep = swept(pending={"0": "ContainerCreating"}, events=events, since=0)
    failed = sweep.run(start_deadline_s=0)[0]
    assert failed.status == "failed" and (reason or "Pending") in failed.reason and "Remedy: " in failed.reason
    assert not reason or "the cause" in failed.reason
    assert [line for line in sweep.said if (reason or "Pending") in line]
    sweep.another()
    sweep.shown = Then(lambda rows: sweep.stop() if any("Remedy: " in text for _, text, _ in rows) else None)
    sweep.run()  # the live table says so too
    assert (reason or "Pending") in sweep.shown[-1][0][1]


def test_pod_that_waits_for_a_moment_is_left_alone(swept: Sweeps) -> None:
    sweep = swept(pending={"0": "ContainerCreating"})
    sweep.shown = Then(lambda rows: sweep.stop() if rows else None)
    assert not sweep.run(start_deadline_s=0)[0].ended
    assert not any("events" in call for call in sweep.state()["calls"])


def test_job_whose_pods_are_forbidden_is_reported_once_and_given_up(swept: Sweeps) -> None:
    words = 'Error creating: pods "train-{}" is forbidden: failed quota: q: must specify limits.cpu'
    sweep = swept(podless=["0"], events={f"train-{SWEEP}-0": words.format(0)})

    def tries(_: Any) -> None:  # each pod would have had another name
        sweep.set(events={f"train-{SWEEP}-0": words.format(len(sweep.shown))})
        if len(sweep.shown) > 6:
            sweep.stop()

    sweep.shown = Then(tries)
    sweep.run()
    lines = [line for line in sweep.said if "must specify" in line]
    assert len(lines) == 1 and "hydra.launcher.cpu" in lines[0]
    sweep.another()
    sweep.signals, sweep.shown = [], []
    reason = sweep.run(start_deadline_s=0)[0].reason
    assert "FailedCreate" in reason and "must specify" in reason


def test_live_table_shows_what_each_job_waits_for(swept: Sweeps) -> None:
    sweep = swept(outcomes={"0": [{"code": 75}, said(1.0)]}, pending={"1": "ImagePullBackOff"})
    sweep.ended = Then(sweep.stop)
    now = time.monotonic()
    sweep.run(2)
    first, last = [[(number, text) for number, text, _ in rows] for rows in (sweep.shown[1], sweep.shown[-1])]
    assert [number for number, _ in first] == [0, 1] and [number for number, _ in last] == [1]
    states = [text for rows in sweep.shown for number, text, _ in rows if number == 0]
    stopped = states.index("failed; exit 75 (stopped, its state saved)")
    assert "running" in states[:stopped] and "running" in states[stopped:]  # in another pod
    assert "ImagePullBackOff" in last[0][1] and "Remedy" in last[0][1]
    assert all(now - 1 <= since <= time.monotonic() for rows in sweep.shown for _, _, since in rows)


def test_status_gives_the_reason_of_a_waiting_job(swept: Sweeps) -> None:
    sweep = swept(
        pending={"0": "Unschedulable"},
        podless=["1"],
        events={f"train-{SWEEP}-1": "exceeded quota: gpus"},
        outcomes={"3": [{"index": 1}], "4": [said(1.0)]},  # job 3 runs on
    )
    for n in range(5):
        (one,) = manifests(n)
        one["spec"] |= {"suspend": True} if n == 2 else {}
        sweep.client.create([one])
    jobs = sweep.jobs
    for _ in range(4):
        states = jobs.collect()
    assert {n: state["status"] for n, state in states.items()} == {**dict.fromkeys(range(3), "waiting"), 3: "running"}
    assert "Unschedulable" in states[0]["reason"] and "Remedy" in states[0]["reason"]
    assert "exceeded quota" in states[1]["reason"] and states[2]["reason"] == watch.QUEUED
    plan = {"kind": "grid", "metric": "val/loss", "direction": "minimize"}
    plans.write(sweep.folder, {**plan, "jobs": [{"job": n, "overrides": [f"seed={n}"]} for n in range(6)]})
    rows = rows_of(sweep.folder, states)
    assert [row["status"] for row in rows] == [*["waiting"] * 3, "running", "completed", "unfinished"]
    assert [row["reason"] for row in rows[:4]] == [states[n]["reason"] for n in range(4)]


def test_queued_job_is_not_given_up(swept: Sweeps) -> None:
    sweep = swept()
    sweep.said = Then(lambda line: sweep.stop() if "queue" in line else None)
    given = Options(image=IMAGE, queue="team", start_deadline_s=0)
    made = manifests(queue="team")
    made[0]["spec"]["suspend"] = True  # as Kueue does
    sweep.jobs.run({0: made}, given, sweep.ended.append, sweep.signals)
    assert len(sweep.said) == 2 and not sweep.ended and not sweep.state()["deleted"]


def test_stop_deletes_what_runs_and_reads_what_has_ended(swept: Sweeps) -> None:
    sweep = swept(outcomes={"0": [said(1.0)]}, pending={"1": "Unschedulable"})
    sweep.ended = Then(sweep.stop)
    sweep.run(2)
    assert sweep.jobs.stop() == ([], [1])
    assert Result.read(sweep.folder / "0").metrics == {"val/loss": 1.0}
    assert sweep.state()["deleted"] == [f"Job/train-{SWEEP}-1"]


def test_stop_names_a_node_that_does_not_answer_and_leaves_its_job(swept: Sweeps) -> None:
    sweep = swept(pending={"1": "Unschedulable"}, stuck=[f"train-{SWEEP}-0"], outcomes={"0": [{"index": 1}]})
    sweep.shown = Then(lambda rows: sweep.stop() if len(rows) == 2 else None)
    sweep.run(2)
    assert sweep.jobs.stop() == ([], [1])
    assert any("kubectl taint node n7" in line for line in sweep.said)
    assert any("is left" in line and f"train-{SWEEP}-0" in line for line in sweep.said)


def _pod(index: int = 0, gone: str | None = None, disrupted: str = "", **end: Any) -> dict[str, Any]:
    metadata = {"name": "p", "labels": {watch.INDEX: str(index)}, **({"deletionTimestamp": gone} if gone else {})}
    status: dict[str, Any] = {"phase": "Running"}
    status["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": disrupted}] if disrupted else []
    status["containerStatuses"] = [{"state": {"terminated": end}}] if end else []
    return {"metadata": metadata, "spec": {"nodeName": "n1"}, "status": status}


LINES: list[tuple[dict[str, Any], str]] = [
    ({"disrupted": "PreemptionByScheduler"}, "preempted by a pod of higher priority"),
    ({"disrupted": "DeletionByTaintManager"}, "its node is lost"),
    ({"disrupted": "TerminationByKubelet"}, "short of memory"),
    ({"exitCode": 137, "reason": "OOMKilled"}, "out of memory"),
    ({"exitCode": 75, "reason": "Error"}, "its state saved"),
    (
        {"gone": "2026-11-26T00:00:00Z"},
        "kubectl taint node n1 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
    ),
    ({"gone": "2099-01-01T00:00:00Z"}, "is being stopped"),
]


@pytest.mark.parametrize(("given", "words"), LINES)
def test_what_happens_to_a_pod_is_named(given: dict[str, Any], words: str) -> None:
    assert words in watch.line(_pod(**given), watch.seconds("2026-11-26T01:00:00Z"))


def test_results_of_a_failed_second_node_are_its_own() -> None:
    pods = [_pod(0, exitCode=75, message='{"code": 75, "status": "stopped"}'), _pod(1, exitCode=1, message="boom")]
    found = watch.results("failed", "Policy: x", pods)
    assert found["status"] == "failed" and found["reason"] == "boom"


def test_log_is_whole_and_without_repeats_across_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubectl: Path
) -> None:
    cluster = ScriptedCluster(kubectl)
    stamps = ["01", "02", "02", "02", "03", "04"]  # several lines of one moment
    lines = [f"2026-11-26T00:00:{s}Z line {i}" for i, s in enumerate(stamps)]
    with cluster.open() as state:
        state |= {"logs": {"p": lines}, "lines_a_stream": 4}

    def ended(self: Cluster, kind: str, name: str) -> dict[str, Any]:
        with cluster.open() as state:
            return _pod(exitCode=0) if len(state["opened"]) > 3 else {"status": {}}

    monkeypatch.setattr(Cluster, "get", ended)
    follow(Cluster(), "p", tmp_path / "0" / "job.log", pause_s=0)
    assert (tmp_path / "0" / "job.log").read_text() == "".join(f"line {i}\n" for i in range(6))
    assert json.loads(cluster.file.read_text())["opened"][0] == ""


def test_log_that_cannot_be_read_is_asked_for_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubectl: Path
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 8:
            raise InterruptedError

    monkeypatch.setattr(Cluster, "command", lambda self, *_: ["sh", "-c", "echo no node >&2; exit 1"])
    monkeypatch.setattr(jobs_module.time, "sleep", sleep)
    with pytest.raises(InterruptedError):
        follow(Cluster(), "p", tmp_path / "0" / "job.log")
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


GRACE: list[tuple[int | None, list[float | None], int | None, int]] = [  # given, measured, then, lines that say so
    (None, [], None, 0),
    (None, [None], None, 0),  # a job without saves
    (None, [2.0, 50.5], 152, 1),
    (None, [2.0], 60, 1),
    (300, [50.5], 300, 0),
    (100, [50.5], 100, 1),
]


@pytest.mark.parametrize(("given", "measured", "grace", "lines"), GRACE)
def test_grace_period_is_three_times_the_slowest_save(
    given: int | None, measured: list[float | None], grace: int | None, lines: int, tmp_path: Path
) -> None:
    for number, seconds in enumerate(measured):
        (tmp_path / str(number)).mkdir()
        found = {"status": "completed", **({"save_seconds": seconds} if seconds else {})}
        write_json(tmp_path / str(number) / "results.json", found)
    said: list[str] = []
    assert with_grace(Options(image=IMAGE, grace_s=given), tmp_path, said.append).grace_s == grace
    assert len(said) == lines
    (job,) = manifests(grace_s=grace)
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == (grace or 120)


# Preflight


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [  # state, options, what is refused, a word of it
    ({"missing": ["runs"]}, {}, "claim", "persistentvolumeclaim"),
    ({"missing": ["corpora"]}, {"volumes": {"corpora": "/c"}}, "volumes", "persistentvolumeclaim"),
    ({"specs": {"runs": {"accessModes": ["ReadWriteOnce"]}}}, {"nodes": 2}, "claim", "one machine"),
    ({"missing": ["wandb"]}, {"secrets": ["wandb"]}, "secrets", "secret"),
    ({"missing": ["team"]}, {"queue": "team"}, "queue", "localqueues"),
    ({"lacks": ["kueue.x-k8s.io"]}, {"queue": "team"}, "queue", "would not queue"),
    ({"missing": ["nope"]}, {"priority": "nope"}, "priority", "priorityclass"),
    ({"missing": ["blockwright"]}, {"kind": "trainjob"}, "runtime", "clustertrainingruntimes"),
    ({"lacks": ["jobset.x-k8s.io"]}, {"kind": "jobset"}, "kind", "jobset"),
    ({"lacks": ["trainer.kubeflow.org"]}, {"kind": "trainjob"}, "kind", "trainjob"),
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


@pytest.mark.parametrize(("state", "options", "option", "words"), MISTAKES)
def test_what_pods_refer_to_must_exist(
    swept: Sweeps, state: dict[str, Any], options: dict[str, Any], option: str, words: str
) -> None:
    sweep = swept(**state)
    _refused(sweep, option, words, **options)
    sweep.set(missing=[], specs={}, lacks=[], denied=[], warning="")
    _preflight(sweep, **options)


@pytest.mark.parametrize("words", WORDS)
def test_what_kubectl_says_becomes_one_message(swept: Sweeps, words: str) -> None:
    _refused(swept(faults=[{"match": "", "stderr": words, "times": 99}]), *WORDS[words])


def test_missing_kubectl_is_refused() -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    for call in (Cluster(run=missing).call, Cluster(run=missing).follow):
        with pytest.raises(ConfigError) as refused:
            call("logs")
        assert refused.value.path == "hydra/launcher"


def test_what_may_not_be_read_is_said_once_not_to_be_checked(swept: Sweeps) -> None:
    sweep = swept(forbidden=["wandb", "team"])
    asked = dataclasses.replace(sweep.client, namespace="team")
    asked.identity()
    needs(asked, settle(asked, Options(image=IMAGE, secrets=["wandb"])))
    unchecked = [line for line in sweep.said if "not checked" in line]
    assert [line.split()[:2] for line in unchecked] == [["namespace", "team"], ["secret", "wandb"]]


def test_namespace_that_is_not_there_is_no_missing_right(swept: Sweeps) -> None:
    sweep = swept(missing=["trainign"], denied=["create jobs.batch"])
    with pytest.raises(ConfigError) as refused:
        settle(dataclasses.replace(sweep.client, namespace="trainign"), Options(image=IMAGE))
    assert (refused.value.path, refused.value.value) == ("hydra.launcher.namespace", "trainign")
    assert "may not" not in refused.value.rule


def test_without_jobset_nodes_are_a_job_and_a_service_and_the_loss_is_named(swept: Sweeps) -> None:
    sweep = swept(lacks=["jobset.x-k8s.io"])
    assert settle(sweep.client, Options(image=IMAGE, nodes=2)).made_as == "job" and sweep.said


def test_job_inside_a_jobset_is_rehearsed_too(swept: Sweeps) -> None:
    tried: list[str] = []
    client = swept().client
    client.create = lambda made, rehearsed=False: tried.extend(m["kind"] for m in made) or ""  # type: ignore[method-assign,func-returns-value]
    rehearse(client, manifests(nodes=2))
    assert tried == ["JobSet", "Job"]


def test_full_quota_is_no_refusal_of_a_rehearsal_and_hides_none(swept: Sweeps) -> None:
    """The jobs of the sweep itself may fill it."""
    sweep = swept(faults=[{"match": "--dry-run", "stderr": FULL, "times": 1}])
    _preflight(sweep)
    wrong = 'Error from server (BadRequest): strict decoding error: unknown field "spec.x"'
    sweep.set(faults=[{"match": "--dry-run", "stderr": f"Warning: w\n{FULL}\n{wrong}\n{FULL}", "times": 1}])
    _refused(sweep, "", "refuses the manifest")


def test_a_right_is_missing_only_when_a_ready_server_says_so_twice(swept: Sweeps) -> None:
    sweep = swept(faults=[{"match": "can-i", "stderr": "no", "times": 1}])
    _preflight(sweep)
    sweep.set(faults=[{"match": "", "stderr": "no", "times": 2}])  # the question, and /readyz
    assert sweep.client.may("create", "jobs.batch")
    sweep.set(faults=[{"match": "can-i", "stderr": "no", "times": 10**6}])
    _refused(sweep, "namespace", "may not create")


# What a real server does


def test_server_that_is_away_for_long_is_waited_for_until_a_signal(swept: Sweeps) -> None:
    sweep = swept(outcomes={"0": [said(1.0)]}, faults=[{"match": "get jobs", "stderr": REFUSED, "times": 40}])
    assert sweep.losses() == [1.0]
    assert len([line for line in sweep.said if "jobs continue" in line]) == 1
    sweep.another(faults=[{"match": "get", "stderr": "Unable to connect to the server: EOF", "times": 10**6}])
    sweep.said = Then(sweep.stop)
    assert not sweep.run()[0].ended


def test_refusal_that_lasts_ends_the_launcher(swept: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = swept(faults=[{"match": "get jobs", "stderr": FORBIDDEN, "from": 3, "times": 10**6}])
    monkeypatch.setattr(jobs_module, "REFUSED_S", 0.05)
    with pytest.raises(ConfigError, match="you may not do this"):
        sweep.run()
    assert any("asks again" in line for line in sweep.said) and len(sweep.state()["made"]) == 1


def test_full_quota_means_no_room_yet(swept: Sweeps) -> None:
    sweep = swept(outcomes={str(n): [said(float(n))] for n in range(3)})
    sweep.set(faults=[{"match": "apply", "stderr": FULL, "times": 2}])
    assert sweep.losses(3) == [0.0, 1.0, 2.0]
    assert any("waits for room" in line for line in sweep.said)
    sweep.another(faults=[{"match": "apply", "stderr": FULL, "times": 10**6}])
    assert "given up" in sweep.run(1, start_deadline_s=0)[0].reason


def test_service_is_its_jobs_and_goes_with_it(swept: Sweeps) -> None:
    sweep = swept(pending={"0": "Unschedulable"})
    sweep.run(nodes=2, kind="job", start_deadline_s=0)
    state = sweep.state()
    assert [name.partition("/")[0] for name in state["made"]] == ["Job", "Service"]
    assert state["deleted"] and not state["objects"]


def test_service_that_a_killed_launcher_has_not_made_is_made(swept: Sweeps) -> None:
    sweep = swept(outcomes={"0": [said(1.0)]})
    sweep.client.create(manifests(nodes=2, kind="job")[:1])
    assert sweep.losses(nodes=2, kind="job") == [1.0]
    (service,) = (o for o in sweep.state()["objects"].values() if o["kind"] == "Service")
    assert service["metadata"]["ownerReferences"][0]["uid"] == "uid-0"


def test_job_deleted_by_hand_is_not_made_again(swept: Sweeps) -> None:
    sweep = swept(pending={"0": "Unschedulable"})
    sweep.shown = Then(lambda rows: sweep.set(objects={}) if rows else None)
    assert "deleted from the cluster" in sweep.run()[0].reason
    assert len(sweep.state()["made"]) == 1


@pytest.mark.parametrize("deletions", [1, 2])
def test_job_that_its_ttl_may_have_deleted_unseen_is_made_again_once(
    swept: Sweeps, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    sweep = swept(outcomes={"0": [said(0.5)]})
    slept, real = [0.0], time.time
    monkeypatch.setattr(jobs_module.time, "time", lambda: real() + slept[0])

    def deletes(rows: Any) -> None:
        if rows and slept[0] < 100 * deletions:
            slept[0] += 100  # a laptop that was closed
            sweep.set(objects={})

    sweep.shown = Then(deletes)
    found = sweep.run(ttl_s=60)[0]
    assert found.metrics == {"val/loss": 0.5} if deletions == 1 else "ttl_s" in found.reason
    assert len(sweep.state()["made"]) == 2


REMEDIES = {
    "exceeded quota: gpus": "parallel",
    'violates PodSecurity "restricted"': "capabilities",
    "no PriorityClass with name high was found": "priority",
    "failed quota: q: must specify limits.cpu for: train": "hydra.launcher.cpu",
    "maximum cpu usage per Container is 2": "limitranges",
    'admission webhook "x" denied the request': "its message says which",
}


def test_pods_that_are_not_made_have_the_remedy_of_their_cause() -> None:
    for words, remedy in REMEDIES.items():
        assert remedy in watch.blocked("FailedCreate", f"pods is forbidden: {words}")


# Answers that a server gives for a while: any call of the launcher may meet one


FOR_A_WHILE = {
    "403": FORBIDDEN,
    "refused": REFUSED,
    "500": "Error from server (InternalError): an error on the server",
    "429": "Error from server (TooManyRequests): the server has received too many requests",
}
AFTER_A_LOOK = {**FOR_A_WHILE, "401": "error: You must be logged in to the server (Unauthorized)"}


def _whole(sweep: Swept) -> dict[int, str]:
    """All that a launcher asks of a cluster: what it checks first, two jobs with Services, one that cannot start."""
    options = {"nodes": 2, "kind": "job", "secrets": ["wandb"], "queue": "team"}
    asked = dataclasses.replace(sweep.client, namespace="team")
    asked.identity()
    given = settle(asked, Options(image=IMAGE, **options))
    needs(asked, given)
    rehearse(asked, render(given, "train", SWEEP, 0, "/runs/x", []))
    sweep.started = len(sweep.state()["calls"])
    return {n: result.status for n, result in sweep.run(3, start_deadline_s=1, **options).items()}


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
    statuses = _whole(plain)
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
            assert _whole(sweep) == statuses, (calls[at], name, after)
            made = sweep.state()["made"]
            assert len({*made}) == len(made) and {*made} <= {*plain.state()["made"]}, (calls[at], name, after)
