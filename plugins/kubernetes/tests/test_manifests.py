"""Options rendered to manifests, and manifests checked, without a cluster."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubelet import expanded
from manifest_check import check, problems
from quickest import takes_less
from scripted_cluster import job_of
from wrong_manifests import CASES, IMAGE, good

from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.render import inner_job, name_of, render
from blockwright.plugins.kubernetes.wanted import OF_RUNTIME, check_names, check_options, mistakes
from blockwright.registry import ConfigError

HERE = Path(__file__).resolve().parent
VERDICTS = json.loads((HERE / "verdicts.json").read_text())
NAMED = {  # a part of the path, the value or the rule of what is found
    "key misspelt (backofLimit)": "backofLimit",
    "number as text (parallelism)": "parallelism",
    "no image": "containers[0].image",
    "no containers": "containerName",
    "two containers of one name": "2 containers",
    "name with capitals": "metadata.name",
    "name of 64 letters": "metadata.name",
    "name of 60 letters, indexed": "with an index",
    "label with a space": "blockwright.dev/job",
    "label of 64 letters": "blockwright.dev/job",
    "annotations of 300 KiB": "262,144",
    "restartPolicy Always": "restartPolicy",
    "no restartPolicy": "restartPolicy",
    "OnFailure with podFailurePolicy": "OnFailure",
    "replace terminating, with podFailurePolicy": "TerminatingOrFailed",
    "exit codes unordered": "[64, 70]",
    "exit code twice": "[64]",
    "exit code 0 In": "0",
    "container of a rule unknown": "trainer",
    "rule with both": "onPodConditions",
    "action unknown": "Restart",
    "FailIndex without backoffLimitPerIndex": "backoffLimitPerIndex",
    "condition without status": "status",
    "indexed without completions": "completions",
    "maxFailedIndexes alone": "backoffLimitPerIndex",
    "successPolicy, not indexed": "successPolicy",
    "negative backoffLimit": "-1",
    "negative grace period": "-5",
    "gpu requests ≠ limits": "limit of 8",
    "gpu requests only": "nvidia.com/gpu",
    "half a gpu": "whole numbers",
    "memory '16GB'": "16GB",
    "requests above limits": "above the limit",
    "unknown resource 'gpu'": "full name",
    "mount of no volume": "nowhere",
    "two mounts at one path": "/runs",
    "volume name with _": "a_b",
    "env name with a space": "A B",
    "env value a number": "env[",
    "toleration Equal without value and Exists with": "Exists",
    "toleration effect unknown": "NoRun",
    "mountPath relative with :": "a:b",
    "sizeLimit negative": "-1Gi",
    "runAsNonRoot with user 0": "root",
    "seccomp unknown": "Default",
    "privileged (restricted namespace)": "privileged",
    "hostPath (restricted namespace)": "hostPath",
    "service: port without number": "port",
    "jobset: key misspelt (maxRestart)": "maxRestart",
    "jobset: action unknown": "Restart",
    "jobset: rule without name": "name",
    "jobset: replicas negative": "-1",
    "jobset: restartStrategy unknown": "All",
    "jobset: two of one name": "node",
    "jobset: InOrder and dependsOn": "dependsOn",
    "jobset: container of a rule unknown (the Job inside)": "containerName",
    "jobset: name too long for its pods (webhook)": "pods",
    "jobset: regular expression wrong (webhook?)": "regular expression",
    "jobset: reason unknown (webhook)": "Bad",
}
ASKED_OF_THE_CLUSTER = {"priorityClass not there"}  # plugins/kubernetes/tests/test_preflight.py


@pytest.mark.parametrize("case", CASES)
def test_checker_refuses_what_a_server_refused_and_names_the_mistake(case: str) -> None:
    found = [str(problem) for problem in problems(CASES[case]())]
    verdict = VERDICTS[case]
    if case.startswith("good"):
        assert not found
        return
    if case in ASKED_OF_THE_CLUSTER:
        return
    assert any(NAMED[case] in problem for problem in found), found
    assert found or ("refused" not in verdict["server"] and "warned" not in verdict["restricted"])


def test_every_recorded_verdict_has_its_manifest() -> None:
    assert set(CASES) == set(VERDICTS)
    refused = {case for case, said in VERDICTS.items() if said["server"].startswith("refused")}
    assert len(refused) == 48
    assert refused <= set(NAMED)


GOLDEN: dict[str, dict[str, Any]] = {
    "job": {},
    "jobset": {"nodes": 2, "gpus": 8, "resources": {"rdma/ib": "1"}, "capabilities": ["IPC_LOCK"], "ttl_s": 3600},
    "service": {"nodes": 2, "kind": "job"},
    "trainjob": {"nodes": 2, "kind": "trainjob", "gpus": 1, "node_selector": {"pool": "gpu"}},
    "kueue": {
        "queue": "team-a",
        "priority": "high",
        "topology": "topology.kubernetes.io/rack",
        "volumes": {"corpora": "/corpora"},
        "env": {"NCCL_SOCKET_IFNAME": "eth0"},
        "secrets": ["wandb"],
        "pull_secrets": ["registry"],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "annotations": {"karpenter.sh/do-not-disrupt": "true", "sidecar.istio.io/inject": "false"},
        "grace_s": 300,
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_rendered_as_recorded(name: str) -> None:
    made = good(**GOLDEN[name])
    check(made)
    check_options(Options(**{"image": IMAGE, "cpu": "1", "memory": "16Gi", **GOLDEN[name]}))
    assert made == list(yaml.safe_load_all((HERE / "golden" / f"{name}.yaml").read_text()))


WORD = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=12).map(lambda text: f"a{text}")
FREE = st.text(min_size=1, max_size=60)


NOT_OF_A_TRAINJOB = st.fixed_dictionaries(
    {
        "secrets": st.lists(WORD, max_size=2, unique=True),
        "capabilities": st.lists(st.sampled_from(["IPC_LOCK", "SYS_PTRACE"]), max_size=1),
        "restarts": st.integers(0, 100),
        "ttl_s": st.none() | st.integers(60, 10**6),
    }
)


@st.composite
def option_sets(draw: st.DrawFn) -> Options:
    """Any valid options."""
    kind = draw(st.sampled_from(["auto", "job", "jobset", "trainjob"]))
    queue = draw(st.none() | WORD)
    claims = draw(st.lists(WORD, max_size=3, unique=True))
    toleration = st.sampled_from([{"operator": "Exists"}, {"key": "a/b", "value": "c", "effect": "NoExecute"}])
    return Options(
        image=draw(st.sampled_from([IMAGE, "bw", "r.example:5000/team/bw:1.2", "ghcr.io/a/b"])),
        kind=kind,
        nodes=draw(st.integers(1, 512)),
        gpus=draw(st.integers(0, 16)),
        gpu=draw(st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"])),
        cpu=draw(st.none() | st.sampled_from(["1", "500m", "4.5", "96"])),
        memory=draw(st.none() | st.sampled_from(["64Gi", "1T", "2e11"])),
        resources=draw(st.dictionaries(st.sampled_from(["rdma/ib", "vpc.amazonaws.com/efa"]), st.just("1"))),
        shm=draw(st.none() | st.sampled_from(["1Gi", "512M"])),
        claim="runs",
        mount=draw(WORD.map(lambda w: f"/{w}")),
        volumes={f"c-{c}": f"/volumes/{c}" for c in claims},
        env=draw(st.dictionaries(WORD.map(lambda w: f"X_{w}0"), FREE, max_size=3)),
        pull_secrets=draw(st.lists(WORD, max_size=1)),
        node_selector=draw(st.dictionaries(WORD, WORD, max_size=2)),
        tolerations=draw(st.lists(toleration, max_size=2)),
        annotations=draw(st.dictionaries(WORD, FREE, max_size=2)),
        labels=draw(st.dictionaries(WORD, WORD, max_size=2)),
        queue=queue,
        priority=draw(st.none() | WORD) if queue or kind != "trainjob" else None,
        topology="topology.kubernetes.io/zone" if queue and draw(st.booleans()) else None,
        grace_s=draw(st.none() | st.integers(10, 3600)),
        **({} if kind == "trainjob" else draw(NOT_OF_A_TRAINJOB)),
    )


def _accepted(options: Options, task: str, number: int, overrides: list[str], schemas: dict[str, Any]) -> None:
    check_options(options)
    made = render(options, task, "0a1b2c3d", number, "/runs/x", overrides)
    check(made)
    for one in made:
        inner = inner_job(one)
        for each in filter(None, (one, inner)):
            if each["kind"] in schemas:
                schemas[each["kind"]].validate(each)
    assert made == json.loads(json.dumps(made))
    _kept(options, made[0], overrides)
    assert made == render(options, task, "0a1b2c3d", number, "/runs/x", overrides)


def _kept(options: Options, job: dict[str, Any], overrides: list[str]) -> None:
    """What a kubelet makes of commands and variables is what was given, whatever is written in them."""
    spec = job["spec"]["trainer"] if job["kind"] == "TrainJob" else job_of(job)["template"]["spec"]["containers"][0]
    known = {"HOME": "/root", "WANDB_API_KEY": "a secret"}
    command = [expanded(word, known) for word in spec["command"]]
    assert command[command.index("--") + 1 :] == overrides
    assert options.env.items() <= {one["name"]: expanded(one["value"], known) for one in spec["env"]}.items()


@pytest.mark.parametrize(
    "text", ["$(HOME)", "$$", "$", "$$(HOME)", "['$(WANDB_API_KEY)']", "${oc.env:HOME}", "a$$$b$("]
)
def test_dollars_reach_the_container_as_they_are_written(text: str) -> None:
    for kind in ("job", "jobset", "trainjob"):
        options = Options(image=IMAGE, kind=kind, env={"X": text})
        _kept(options, render(options, "t", "0a1b2c3d", 0, "/runs/x", [f"f={text}"])[0], [f"f={text}"])


OF_THE_LAUNCHER = {  # options that no manifest shows, and who reads them
    "_target_": "Hydra",
    "namespace": "kubectl; render writes it",
    "context": "kubectl",
    "start_deadline_s": "Jobs",
    "parallel": "Jobs",
    "on_stop": "Launch",
    "render": "Launch",
}
OTHER: dict[str, Any] = {  # another value of each option, and what it needs
    "image": "other",
    "kind": "jobset",
    "runtime": "other",
    "nodes": 3,
    "gpus": 2,
    "gpu": "amd.com/gpu",
    "cpu": "3",
    "memory": "32Gi",
    "resources": {"ephemeral-storage": "1Gi"},
    "shm": "1Gi",
    "claim": "a.dotted.claim",
    "mount": "/elsewhere",
    "volumes": {"b.dotted": "/b"},
    "env": {"X": "1"},
    "secrets": ["wandb"],
    "pull_secrets": ["registry"],
    "node_selector": {"pool": "x"},
    "tolerations": [{"operator": "Exists"}],
    "labels": {"team": "x"},
    "annotations": {"Example.com/x": "y"},
    "capabilities": ["IPC_LOCK"],
    "queue": "team",
    "priority": "high",
    "topology": "topology.kubernetes.io/zone",
    "grace_s": 99,
    "restarts": 2,
    "ttl_s": 600,
}


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Options) if f.name not in OF_THE_LAUNCHER])
def test_every_option_shows_in_the_manifest_or_is_refused(kind: str, name: str) -> None:
    around: dict[str, Any] = {
        "image": IMAGE,
        "kind": kind,
        "gpus": 1,
        "memory": "16Gi",
        **({"queue": "q"} if name == "topology" else {}),
    }
    changed = Options(**{**around, name: "trainjob" if (name, kind) == ("kind", "jobset") else OTHER[name]})
    if any(mistakes(changed)):
        assert name in OF_RUNTIME if kind == "trainjob" else name == "runtime"
        return
    made = [render(options, "t", "0a1b2c3d", 0, "/runs/x", []) for options in (Options(**around), changed)]
    assert made[0] != made[1]
    check(made[1])


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(option_sets(), FREE, st.integers(0, 9999), st.lists(FREE, max_size=3))
def test_any_valid_options_render_to_what_is_accepted(options: Options, task: str, n: int, given: list[str]) -> None:
    _accepted(options, task, n, given, {})


def _schemas() -> dict[str, Any]:
    """Strict validators by kind, built once: kubernetes_validate.validate reads 3 MB for each object."""
    utils = pytest.importorskip("kubernetes_validate.utils", reason="needs the extra kubernetes")
    from jsonschema.validators import Draft202012Validator
    from referencing import Registry, Resource

    made = {}
    folder = f"kubernetes-json-schema/v{next(v for v in utils.all_versions() if v.startswith('1.36'))}-local-strict"
    definitions = Resource.from_contents(utils.schema_contents(f"{folder}/_definitions.json", "1.36"))
    for kind, file in (("Job", "job-batch-v1"), ("Service", "service-v1")):
        schema = utils.schema_contents(f"{folder}/{file}.json", "1.36")
        registry: Any = definitions @ (Resource.from_contents(schema) @ Registry())
        made[kind] = Draft202012Validator(schema, registry=registry)
    return made


@pytest.mark.slow
def test_ten_thousand_option_sets_render_to_what_the_schemas_of_kubernetes_accept() -> None:
    schemas = _schemas()

    @settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(option_sets(), FREE, st.integers(0, 9999), st.lists(FREE, max_size=3))
    def accepted(options: Options, task: str, number: int, overrides: list[str]) -> None:
        _accepted(options, task, number, overrides, schemas)

    accepted()


def test_shortened_names_of_tasks_stay_different() -> None:
    tasks = ["a" * 40, "a" * 41, "A" * 40, "a_b", "1a", "ä", "x" * 29 + "-y"]
    names = {name_of(task, "0a1b2c3d", 9999) for task in tasks}
    assert len(names) == len(tasks)
    assert max(map(len, names)) <= 63 - len("-node-0-511-abcde")


def test_five_hundred_jobs_are_rendered_and_checked_in_five_seconds() -> None:
    def five_hundred() -> None:
        for number in range(500):
            check(render(Options(image=IMAGE, nodes=2), "train", "0a1b2c3d", number, "/runs/x", ["seed=1"] * 20))

    assert takes_less(5, five_hundred)


WRONG: list[tuple[str, Any, str]] = [
    ("image", None, "image"),
    ("image", "My Image", "name of an image"),
    ("nodes", 0, "at least 1"),
    ("gpus", -1, "at least 0"),
    ("parallel", 0, "at least 1"),
    ("restarts", -1, "at least 0"),
    ("grace_s", 5, "at least 10"),
    ("ttl_s", 59, "at least 60"),
    ("start_deadline_s", 0, "at least 1"),
    ("kind", "pod", "Known: auto, job, jobset, trainjob"),
    ("on_stop", "kill", "on_stop=leave or hydra.launcher.on_stop=stop"),
    ("namespace", "My_Team", "lower-case"),
    ("namespace", "a" * 64, "63 at most"),
    ("claim", "runs_1", "lower-case"),
    ("claim", "a" * 254, "253 at most"),
    ("queue", "a" * 64, "63 at most"),
    ("queue", "Q", "lower-case"),
    ("cpu", "four", "quantity"),
    ("memory", "16GB", "quantity"),
    ("memory", "64", "under 1 MiB"),
    ("shm", "-1Gi", "quantity"),
    ("gpu", "gpu", "full name of a device"),
    ("resources", {"nvidia.com/gpu": "1"}, "given by gpus"),
    ("resources", {"rdma": "1"}, "full name of a device"),
    ("mount", "runs", "absolute path"),
    ("mount", "/a:b", "absolute path"),
    ("volumes", {"runs": "/x"}, "already"),
    ("volumes", {"data": "/runs"}, "two volumes"),
    ("volumes", {"data": "/tmp"}, "two volumes"),
    ("env", {"A B": "1"}, "name of an environment variable"),
    ("env", {"WANDB_API_KEY": "hunter2hunter2"}, "looks like a secret"),
    ("env", {"LOGIN": "hf_hunter2hunter2"}, "looks like a secret"),
    ("env", {"MASTER_ADDR": "x"}, "set by the launcher"),
    ("secrets", ["sk_live_0123456789012345678901234567890123"], "not the name of a Secret"),
    ("node_selector", {"pool": "a b"}, "label"),
    ("annotations", {"a b": "c"}, "not a valid key"),
    ("tolerations", [{"key": "a", "operator": "Exists", "value": "x"}], "must be empty"),
    ("tolerations", [{"key": "a", "effct": "NoRun"}], "Did you mean 'effect'"),
    ("tolerations", ["gpu"], "mapping"),
    ("tolerations", [{"key": "a", "operator": "Exist"}], "Did you mean 'Exists'"),
    ("tolerations", [{"operator": "Equal", "value": "x"}], "required"),
    ("tolerations", [{"key": "a", "value": 1}], "must be a string"),
    ("tolerations", [{"key": "a", "operator": "Exists", "tolerationSeconds": "9"}], "must be an integer"),
    ("annotations", {"a": "b" * 300_000}, "262,144 bytes"),
    ("resources", {"rdma/ib": "500m"}, "whole numbers"),
    ("tolerations", [{"key": "a", "effect": "NoRun"}], "must be one of"),
    ("node_selector", {"a" * 64: "b"}, "not a valid key"),
    ("capabilities", ["CAP_IPC_LOCK"], "without CAP_"),
    ("topology", "zone", "needs a queue"),
    ("runtime", "other", "is of a TrainJob"),
    ("secrets", ["wandb", "wandb"], "named twice"),
    ("restarts", 10**12, "at most"),
    ("ttl_s", 10**12, "at most"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_option_is_one_message(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_options(Options(**{"image": IMAGE, name: value}))
    assert refused.value.path.startswith(f"hydra.launcher.{name}")
    assert said in str(refused.value)
    assert refused.value.remedy
    assert "hunter2" not in str(refused.value) and "sk_live" not in str(refused.value)
    assert len(list(mistakes(Options(**{"image": IMAGE, name: value})))) == 1


@pytest.mark.parametrize("options", [{"kind": "job"}, {"nodes": 2}, {"kind": "trainjob"}], ids=str)
def test_name_that_makes_names_of_pods_too_long_is_refused(options: dict[str, Any]) -> None:
    given = Options(image=IMAGE, **options)
    check_names(given, ["a" * 45])
    with pytest.raises(ConfigError, match="63 are allowed") as refused:
        check_names(given, ["a" * 45, "a" * 62])
    assert refused.value.value == "a" * 62 and refused.value.remedy == "Shorten task_name"


def test_every_option_is_described() -> None:
    for option in dataclasses.fields(Options):
        assert option.name == "_target_" or f"        {option.name}: " in (Options.__doc__ or ""), option.name
