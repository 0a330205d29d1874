"""Options rendered to manifests, and manifests checked, without a cluster."""

from __future__ import annotations

import dataclasses
import itertools
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
from scripted_cluster import job_of
from wrong_manifests import GOOD, IMAGE, WRONG, good, manifest

from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.render import inner_job, name_of, render
from blockwright.plugins.kubernetes.wanted import OF_RUNTIME, check_names, check_options, mistakes
from blockwright.registry import ConfigError

HERE = Path(__file__).resolve().parent


def test_checker_refuses_what_a_server_refused_and_names_the_mistake() -> None:
    verdicts = json.loads((HERE / "verdicts.json").read_text())
    assert {*WRONG, *GOOD} == {*verdicts}
    wrong = {}
    for case, said in verdicts.items():
        found = list(problems(manifest(case)))
        refused = said["server"].startswith("refused") or "warned" in said["restricted"]
        if case in GOOD or case == "priorityClass not there":  # asked of the cluster: test_jobs.py
            wrong |= {case: found} if found or (refused and case in GOOD) else {}
        elif not any(WRONG[case][2] in problem for problem in found):
            wrong[case] = found
    assert not wrong


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
    check_options(Options(image=IMAGE, **GOLDEN[name]))
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


def test_dollars_reach_the_container_as_they_are_written() -> None:
    texts = ("$(HOME)", "$$", "$", "$$(HOME)", "['$(WANDB_API_KEY)']", "${oc.env:HOME}", "a$$$b$(")
    for text, kind in itertools.product(texts, ("job", "jobset", "trainjob")):
        options = Options(image=IMAGE, kind=kind, env={"X": text})
        _kept(options, render(options, "t", "0a1b2c3d", 0, "/runs/x", [f"f={text}"])[0], [f"f={text}"])


# Options that no manifest shows: Hydra, kubectl and the launcher read them.
OF_THE_LAUNCHER = ("_target_", "namespace", "context", "start_deadline_s", "parallel", "on_stop", "render")
# Another value of each other option.
OTHER: dict[str, Any] = {"image": "other", "kind": "jobset", "runtime": "other", "nodes": 3, "gpus": 2, "cpu": "3"}
OTHER |= {"gpu": "amd.com/gpu", "memory": "32Gi", "resources": {"ephemeral-storage": "1Gi"}, "shm": "1Gi"}
OTHER |= {"claim": "a.dotted.claim", "mount": "/elsewhere", "volumes": {"b.dotted": "/b"}, "env": {"X": "1"}}
OTHER |= {"secrets": ["wandb"], "pull_secrets": ["registry"], "node_selector": {"pool": "x"}, "labels": {"team": "x"}}
OTHER |= {"tolerations": [{"operator": "Exists"}], "annotations": {"Example.com/x": "y"}, "capabilities": ["IPC_LOCK"]}
OTHER |= {"queue": "team", "priority": "high", "topology": "topology.kubernetes.io/zone", "grace_s": 99, "restarts": 2}
OTHER |= {"ttl_s": 600}


def test_every_option_shows_in_the_manifest_or_is_refused() -> None:
    assert {*OTHER, *OF_THE_LAUNCHER} == {field.name for field in dataclasses.fields(Options)}
    wrong = []
    for kind, name in itertools.product(("job", "jobset", "trainjob"), OTHER):
        around = {
            "image": IMAGE,
            "kind": kind,
            "gpus": 1,
            "memory": "16Gi",
            "queue": "q" if name == "topology" else None,
        }
        changed = Options(**{**around, name: "trainjob" if (name, kind) == ("kind", "jobset") else OTHER[name]})
        if any(mistakes(changed)):
            refused = name in OF_RUNTIME if kind == "trainjob" else name == "runtime"
            wrong += [] if refused else [(kind, name, "refused")]
            continue
        made = [render(options, "t", "0a1b2c3d", 0, "/runs/x", []) for options in (Options(**around), changed)]
        wrong += [(kind, name, "not shown")] if made[0] == made[1] else []
        check(made[1])
    assert not wrong


def _schemas() -> dict[str, Any]:
    """Strict validators by kind, built once; none without the extra kubernetes."""
    try:
        from jsonschema.validators import Draft202012Validator
        from kubernetes_validate import utils
        from referencing import Registry, Resource
    except ImportError:
        return {}
    made = {}
    folder = f"kubernetes-json-schema/v{next(v for v in utils.all_versions() if v.startswith('1.36'))}-local-strict"
    definitions = Resource.from_contents(utils.schema_contents(f"{folder}/_definitions.json", "1.36"))
    for kind, file in (("Job", "job-batch-v1"), ("Service", "service-v1")):
        schema = utils.schema_contents(f"{folder}/{file}.json", "1.36")
        registry: Any = definitions @ (Resource.from_contents(schema) @ Registry())
        made[kind] = Draft202012Validator(schema, registry=registry)
    return made


@pytest.mark.slow
def test_any_valid_options_render_to_what_is_accepted() -> None:
    schemas = _schemas()

    @settings(max_examples=5_000 if schemas else 200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(option_sets(), FREE, st.integers(0, 9999), st.lists(FREE, max_size=3))
    def accepted(options: Options, task: str, number: int, overrides: list[str]) -> None:
        _accepted(options, task, number, overrides, schemas)

    accepted()


def test_shortened_names_of_tasks_stay_different() -> None:
    tasks = ["a" * 40, "a" * 41, "A" * 40, "a_b", "1a", "ä", "x" * 29 + "-y"]
    names = {name_of(task, "0a1b2c3d", 9999) for task in tasks}
    assert len(names) == len(tasks)
    assert max(map(len, names)) <= 63 - len("-node-0-511-abcde")


TOLERATION = {"key": "a", "operator": "Exists"}
TOLERATIONS = [{**TOLERATION, "value": "x"}, {**TOLERATION, "tolerationSeconds": "9"}, {"key": "a", "effct": "NoRun"}]
TOLERATIONS += [{"operator": "Equal", "value": "x"}, {"key": "a", "operator": "Exist"}, {"key": "a", "value": 1}]
TOLERATIONS += [{"key": "a", "effect": "NoRun"}, "gpu"]  # type: ignore[list-item]
# Options, and values of each that are refused.
WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {"image": (None, "My Image"), "nodes": (0,), "gpus": (-1,), "gpu": ("gpu",)}
WRONG_OPTIONS |= {"parallel": (0,), "grace_s": (5,), "restarts": (-1, 10**12), "ttl_s": (59, 10**12), "cpu": ("four",)}
WRONG_OPTIONS |= {"start_deadline_s": (0,), "kind": ("pod",), "on_stop": ("kill",), "queue": ("Q", "a" * 64)}
WRONG_OPTIONS |= {"namespace": ("My_Team", "a" * 64), "claim": ("runs_1", "a" * 254), "memory": ("16GB", "64")}
WRONG_OPTIONS |= {"shm": ("-1Gi",), "mount": ("runs", "/a:b"), "topology": ("zone",), "runtime": ("other",)}
WRONG_OPTIONS |= {"resources": ({"nvidia.com/gpu": "1"}, {"rdma": "1"}, {"rdma/ib": "500m"})}
WRONG_OPTIONS |= {"volumes": ({"runs": "/x"}, {"data": "/runs"}, {"data": "/tmp"}), "capabilities": (["CAP_IPC_LOCK"],)}
WRONG_OPTIONS |= {"env": ({"A B": "1"}, {"API_KEY": "hunter2"}, {"LOGIN": "hf_hunter2hunter2"}, {"MASTER_ADDR": "x"})}
WRONG_OPTIONS |= {"secrets": (["sk_live_0123456789012345678901234567890123"], ["wandb", "wandb"])}
WRONG_OPTIONS |= {"node_selector": ({"pool": "a b"}, {"a" * 64: "b"}), "labels": ({"blockwright.dev/job": "x"},)}
WRONG_OPTIONS |= {"annotations": ({"a b": "c"}, {"a": "b" * 300_000}), "tolerations": tuple([t] for t in TOLERATIONS)}


@pytest.mark.parametrize(("name", "values"), WRONG_OPTIONS.items())
def test_wrong_option_is_one_message_without_its_secrets(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        options = Options(**{"image": IMAGE, name: value})
        with pytest.raises(ConfigError) as refused:
            check_options(options)
        said = str(refused.value)
        assert refused.value.path.startswith(f"hydra.launcher.{name}") and refused.value.remedy
        assert "hunter2" not in said and "sk_live" not in said
        assert len(list(mistakes(options))) == 1, value


@pytest.mark.parametrize("options", [{"kind": "job"}, {"nodes": 2}, {"kind": "trainjob"}], ids=str)
def test_name_that_makes_names_of_pods_too_long_is_refused(options: dict[str, Any]) -> None:
    given = Options(image=IMAGE, **options)
    check_names(given, ["a" * 45])
    with pytest.raises(ConfigError) as refused:
        check_names(given, ["a" * 45, "a" * 62])
    assert (refused.value.path, refused.value.value) == ("metadata.name", "a" * 62)
