"""``train.py -m hydra/launcher=kubernetes`` as a user starts it, with a scripted kubectl on PATH."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext
from kubelet import expanded
from omegaconf import OmegaConf
from scripted_cluster import ScriptedCluster
from warm import Running, Warm
from wrong_manifests import IMAGE

from blockwright import registry
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.callback import begin
from blockwright.lab.sweep.study import open_study
from blockwright.lab.sweep.table import rows_of
from blockwright.plugins.kubernetes import jobs as jobs_module
from blockwright.plugins.kubernetes.launch import Launch
from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.pod import message
from blockwright.plugins.kubernetes.wanted import check_overrides, check_world
from blockwright.registry import ConfigError
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.conf import CONF
from blockwright.training.result import Result
from hydra_plugins.blockwright_kubernetes import launcher

TRAIN = str(Path(__file__).resolve().parents[3] / "train.py")
RATES = (0.001, 0.002, 0.003, 0.004)
LOSSES = {0: 2.5, 1: 2.25, 3: 2.125}  # job 2 diverges
Start = Callable[..., Running]
Launched = Callable[..., list[Any]]
pytestmark = pytest.mark.xdist_group("kubernetes")


def results(number: int) -> Result:
    if number not in LOSSES:
        return Result("diverged", reason="diverged at step 3: loss is nan")
    metrics = {"val/loss": LOSSES[number], "val/bits_per_byte": LOSSES[number] / 2, "speed/tokens_per_second": 100.0}
    return Result("completed", parameters=7, active_parameters=5, metrics=metrics)


@pytest.fixture
def cluster(kubectl: Path) -> ScriptedCluster:
    """What its pods come to: one is evicted, one killed."""
    made = ScriptedCluster(kubectl)
    outcomes = {str(n): [{"code": code, "message": message(results(n), code)}] for n, code in enumerate((0, 0, 70, 0))}
    outcomes["1"][:0] = [{"code": 75, "disrupted": "EvictionByEvictionAPI"}]
    outcomes["3"][:0] = [{"code": 137}]
    with made.open() as state:
        state["outcomes"] = outcomes
    return made


@pytest.fixture
def start(warm: Warm, environment: dict[str, str], tmp_path: Path, kubectl: Path, small: list[str]) -> Start:
    """Starts the sweep, or another command of ``python``."""
    names = ("PATH", "SCRIPTED_CLUSTER")

    def call(*arguments: str, command: tuple[str, ...] = (), merge: bool = True) -> Running:
        options = ["-m", "hydra/launcher=kubernetes", f"hydra.launcher.image={IMAGE}"]
        usual = ["hydra.sweep.dir=sweep", f"optimizer.lr={','.join(map(str, RATES))}"]
        keys = {argument.partition("=")[0] for argument in arguments}
        given = [*options, *small, *(o for o in usual if o.partition("=")[0] not in keys), *arguments]
        variables = {**environment, **{name: os.environ[name] for name in names}}
        return warm.start(*(command or (TRAIN, *given)), cwd=tmp_path, env=variables, merge=merge)

    return call


def local(folder: Path) -> list[dict[str, Any]]:
    """The table of the same sweep, run on one machine."""
    jobs = [{"job": n, "overrides": [f"optimizer.lr={rate}"]} for n, rate in enumerate(RATES)]
    plans.write(folder, {"kind": "grid", "metric": "val/loss", "direction": "minimize", "jobs": jobs})
    for number in range(len(RATES)):
        (folder / str(number)).mkdir()
        results(number).write(folder / str(number))
    return rows_of(folder)


def state_of(cluster: ScriptedCluster) -> dict[str, Any]:
    return json.loads(cluster.file.read_text())


def kinds(cluster: ScriptedCluster, kind: str) -> list[dict[str, Any]]:
    return [o for o in state_of(cluster)["objects"].values() if o["kind"] == kind]


def wait(true: Callable[[], bool], process: Running) -> None:
    """Until something is true, or the process has ended."""
    until = time.monotonic() + 120
    while not true() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def table(sweep: Path) -> list[dict[str, Any]]:
    common = len(plans.read(sweep)["jobs"][0]["overrides"])
    assert common > 1
    return rows_of(sweep)


@pytest.mark.slow
def test_killed_launcher_loses_no_job_and_makes_none_twice(
    start: Start, cluster: ScriptedCluster, tmp_path: Path
) -> None:
    """Killed at random moments, as it began and resumed; then one ends."""
    draw = random.Random(2)
    for i in range(3):
        with cluster.open() as state:
            state["outcomes"] = {k: [{"code": 75}] * 3 + v for k, v in state["outcomes"].items()}
        resumed = i % 2 and (tmp_path / "sweep/plan.json").exists()
        process = start(command=("-m", "blockwright.lab.sweep", "resume", str(tmp_path / "sweep")) if resumed else ())
        wanted = len(state_of(cluster)["calls"]) + draw.randint(0, 14)
        wait(lambda wanted=wanted: len(state_of(cluster)["calls"]) >= wanted, process)  # type: ignore[misc]
        time.sleep(draw.random() / 10)
        if process.poll() is None:
            os.killpg(process.pid, 9)
    process = start()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert table(tmp_path / "sweep") == local(tmp_path / "local")
    made = state_of(cluster)["made"]
    assert len(made) == len(RATES) == len(set(made))


@pytest.mark.slow
def test_status_stop_and_retry_ask_the_cluster_and_the_sweep_is_that_of_one_machine(
    start: Start, cluster: ScriptedCluster, tmp_path: Path
) -> None:
    with cluster.open() as state:
        state["pending"] = {"3": "Unschedulable"}
    process = start()
    wait(lambda: "ended" in process.read(), process)
    process.send_signal(2)
    said, _ = process.communicate()
    assert process.returncode == 75 and "continue in the cluster" in said and "blockwright sweep resume" in said, said
    assert "evicted" in said and "job 2 diverged" in said

    def sweep(action: str, *more: str) -> str:
        process = start(command=("-m", "blockwright.lab.sweep", action, str(tmp_path / "sweep"), *more), merge=False)
        said, wrong = process.communicate()
        assert process.returncode == 0, said + wrong
        return said

    document = json.loads(sweep("status", "--json"))
    assert document["jobs"][3]["status"] == "waiting" and "Unschedulable" in document["jobs"][3]["reason"]
    sweep("stop")
    assert state_of(cluster)["deleted"][-1].endswith("-3")
    with cluster.open() as state:
        state["pending"] = {}
        state["outcomes"]["2"] = [{"code": 0, "message": message(results(0), 0)}]
    assert "4/4 ended" in sweep("retry")  # what was stopped, and what failed
    (again, expected) = table(tmp_path / "sweep"), local(tmp_path / "local")
    assert [row for row in again if row["job"] != 2] == [row for row in expected if row["job"] != 2]
    assert json.loads(sweep("status", "--json"))["jobs"][2]["status"] == "completed"
    assert (tmp_path / "sweep" / "summary.csv").exists()


@pytest.mark.slow
def test_plan_of_jobs_that_start_from_others_runs_in_rounds(
    start: Start, cluster: ScriptedCluster, small: list[str], tmp_path: Path
) -> None:
    """As a comparison with launcher=kubernetes runs it: pods get the numbers of the jobs that they start from."""
    done = [{"code": 0, "message": message(results(0), 0)}]
    with cluster.open() as state:
        state["outcomes"] = {"0": done, "1": done, "2": [{"code": 64, "message": message(Result("failed"), 64)}]}
    sweep, chosen = tmp_path / "sweep", ["hydra/launcher=kubernetes", f"hydra.launcher.image={IMAGE}"]
    starts: list[dict[str, int]] = [{}, {"after": 0, "from_step": 8}, {}, {"after": 2}, {"after": 1}]
    jobs = [{"job": n, "overrides": [*small, f"seed={n}"], **each} for n, each in enumerate(starts)]
    plan = {"kind": "grid", "name": "mine", "metric": "val/loss", "direction": "minimize", "workers": 8, "jobs": jobs}
    plans.write(
        sweep, {**plan, "launcher": chosen, "cluster": {"sweep": "abcdefgh", "context": None}, "cwd": str(tmp_path)}
    )
    process = start(command=("-m", "blockwright.lab.sweep", "resume", str(sweep)))
    said, _ = process.communicate()
    assert process.returncode == 0, said
    state = state_of(cluster)
    made = [name.rpartition("-")[2] for name in state["made"]]
    assert sorted(made[:2]) == ["0", "2"] and made[2:] == ["1", "4"]
    assert [row["status"] for row in rows_of(sweep)] == ["completed", "completed", "failed", "failed", "completed"]
    pods = [o for o in state["objects"].values() if o["kind"] == "Pod"]
    commands = {}
    for pod in pods:
        words = pod["spec"]["containers"][0]["command"]
        commands[int(pod["metadata"]["labels"]["blockwright.dev/job"])] = words[3 : words.index("--")]
        assert not any(str(sweep) in word for word in words)  # a folder of this machine
    folder = "/runs/mine-abcdefgh"
    assert commands[0] == [folder, "0"] and commands[4] == ["--after", "1", folder, "4"]
    assert commands[1] == ["--after", "0", "--from-step", "8", folder, "1"]


def _composed(*overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(compose_config(list(overrides)).trainer, resolve=False)  # type: ignore[return-value]


WORLDS: list[tuple[dict[str, Any], list[str], str | None]] = [
    ({"nodes": 2}, ["trainer.num_nodes=3"], "trainer.num_nodes"),
    ({"gpus": 0}, ["trainer=ddp"], "trainer.accelerator"),
    ({"gpus": 8, "nodes": 2}, ["trainer=fsdp", "trainer.strategy.shard=8"], "trainer.strategy.shard"),
    ({"gpus": 8, "nodes": 4}, ["trainer=fsdp", "trainer.strategy.tensor=8"], None),
]


@pytest.mark.parametrize(("options", "overrides", "path"), WORLDS)
def test_world_agrees_with_nodes_and_gpus(options: dict[str, Any], overrides: list[str], path: str | None) -> None:
    given = Options(image=IMAGE, **options)
    if path is None:
        assert check_world(given, _composed(*overrides)) == [f"++trainer.num_nodes={given.nodes}"]
        return
    with pytest.raises(ConfigError) as refused:
        check_world(given, _composed(*overrides))
    assert refused.value.path == path and refused.value.remedy


@pytest.fixture
def launched(kubectl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: list[str]) -> Iterator[Launched]:
    """Runs the launcher on jobs of a configuration, in this process."""
    monkeypatch.setattr(jobs_module, "TICK_S", 0)
    GlobalHydra.instance().clear()
    registry.load()

    def call(*overrides: str, jobs: Sequence[Sequence[str]] = ((),)) -> list[Any]:
        given = [*small, "hydra/launcher=kubernetes", f"hydra.launcher.image={IMAGE}", *overrides]
        config = compose("config", overrides=[*given, f"hydra.sweep.dir={tmp_path}/sweep"], return_hydra_config=True)
        (tmp_path / "sweep").mkdir(exist_ok=True)
        if not (tmp_path / "sweep" / plans.PLAN).exists():
            begin(tmp_path / "sweep", config, [])
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        given_options = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        (first,) = plans.read(tmp_path / "sweep")["jobs"]
        wanted = [[*first["overrides"], *one] for one in jobs]
        return Launch(given_options, context, config).launch(wanted, 0)  # type: ignore[arg-type]

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield call


def test_secrets_by_value_and_pruning_are_refused(
    launched: Launched, cluster: ScriptedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_LOGIN", "hunter2hunter2")
    pruned = ("callbacks=[default,pruning]", "callbacks.pruning.pruner=null")  # pods do not see the study
    refused = {"callbacks.pruning": pruned, "+logger.wandb.api_key": ("+logger.wandb.api_key=hunter2hunter2",)}
    for path, given in {**refused, "hydra.launcher.env": ("+hydra.launcher.env.LOGIN=${oc.env:MY_LOGIN}",)}.items():
        shutil.rmtree(tmp_path / "sweep", ignore_errors=True)
        with pytest.raises(ConfigError) as caught:
            launched(*given)
        assert caught.value.path == path and "hunter2" not in str(caught.value)
    for given in ("+x.url=s3://user:hunter2@host/bucket", "+tags=[a,ghp_0123456789abcdef]", "+x=hf_abcdefgh"):
        with pytest.raises(ConfigError) as caught:
            check_overrides([given], {})
        assert caught.value.path == given.partition("=")[0] and given.partition("=")[2] not in str(caught.value)
    assert not state_of(cluster)["calls"]


def test_secret_of_the_environment_is_read_in_the_pod_and_written_nowhere(
    launched: Launched, cluster: ScriptedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_LOGIN", "hunter2hunter2")
    launched("+logger.wandb.api_key=${oc.env:MY_LOGIN}")
    (job,) = kinds(cluster, "Job")
    command = [expanded(w, {}) for w in job["spec"]["template"]["spec"]["containers"][0]["command"]]
    assert compose_config(command[command.index("--") + 1 :]).logger.wandb.api_key == "hunter2hunter2"
    written = [cluster.file, *(tmp_path / "sweep").rglob("*.json")]
    assert len(written) > 2 and not [file for file in written if "hunter2" in file.read_text()]


@pytest.mark.slow
def test_later_jobs_have_a_grace_period_from_the_saves_of_earlier_ones(
    launched: Launched, cluster: ScriptedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.open() as state:
        found = Result("completed", metrics={"val/loss": 2.5}, save_seconds=50.5)
        state["outcomes"] = {"0": [{"code": 0, "message": message(found, 0)}]}
    (ended,) = launched()
    assert ended.return_value == 2.5
    launched(jobs=((), ("seed=1",)))
    specs = [job["spec"]["template"]["spec"] for job in kinds(cluster, "Job")]
    assert [spec["terminationGracePeriodSeconds"] for spec in specs] == [120, 152]
    assert "152 s" in capsys.readouterr().out


def test_render_writes_manifests_with_their_namespace_and_starts_nothing(
    launched: Launched, cluster: ScriptedCluster, tmp_path: Path
) -> None:
    render = (f"hydra.launcher.render={tmp_path}/out", "hydra.launcher.namespace=team")
    with pytest.raises(SystemExit) as ended:
        launched(*render, jobs=[[f"seed={n}"] for n in range(4)])
    assert ended.value.code == 0
    made = [yaml.safe_load((tmp_path / "out" / f"{n}.yaml").read_text()) for n in range(4)]
    assert [(one["kind"], one["metadata"]["namespace"]) for one in made] == [("Job", "team")] * 4
    assert not state_of(cluster)["calls"]


@pytest.mark.slow
def test_refusal_starts_nothing(start: Start, cluster: ScriptedCluster, small: list[str]) -> None:
    process = start("hydra.launcher.gpus=8")
    printed, _ = process.communicate()
    assert process.returncode == 64, printed
    assert "hydra.launcher.gpus = 8" in printed and printed.count("error: ") == 1
    process = start(command=(TRAIN, "hydra/launcher=kubernetes", f"hydra.launcher.image={IMAGE}", *small))
    said, _ = process.communicate()  # which Hydra would ignore without -m
    assert process.returncode == 64 and "Add -m" in said, said
    assert not state_of(cluster)["calls"]


@pytest.mark.slow
def test_killed_search_equals_one_never_killed(start: Start, cluster: ScriptedCluster, tmp_path: Path) -> None:
    """Optuna, six trials, three at a time; the launcher is killed in the second batch."""

    def value(number: int) -> list[dict[str, Any]]:
        found = Result("completed", metrics={"val/loss": 2 + ((number * 7) % 5) / 8})
        return [{"code": 75}, {"code": 0, "message": message(found, 0)}]

    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3"]
    search += ["hydra.sweeper.sampler.seed=3", "hydra.sweeper.sampler.n_startup_trials=3"]
    search += ["optimizer.lr=tag(log, interval(1e-4, 1e-2))"]

    def run(folder: str) -> Running:
        with cluster.open() as state:
            state |= {"objects": {}, "made": [], "outcomes": {str(n): value(n) for n in range(6)}}
        return start(*search, f"hydra.sweep.dir={folder}")

    whole = run("whole")
    said, _ = whole.communicate()
    assert whole.returncode == 0, said
    killed = run("killed")
    wait(lambda: len(state_of(cluster)["made"]) >= 4, killed)
    os.killpg(killed.pid, 9)
    killed.communicate()  # it has the lock of its folder until it is gone
    resumed = start(command=("-m", "blockwright.lab.sweep", "resume", str(tmp_path / "killed")))
    said, _ = resumed.communicate()
    assert resumed.returncode == 0, said
    made = state_of(cluster)["made"]
    assert len(made) == len(set(made)) == 6
    studies = [open_study(tmp_path / name, plans.read(tmp_path / name)) for name in ("whole", "killed")]
    drawn = [[(t.number, t.params, t.value, t.state) for t in study.trials] for study in studies]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6


@pytest.mark.slow
def test_sweep_stays_where_its_jobs_are(launched: Launched, cluster: ScriptedCluster, tmp_path: Path) -> None:
    """Whatever kubectl's context has become since."""

    def moved(**to: str) -> None:
        with cluster.open() as state:
            state |= to

    moved(context="home", namespace="team")
    launched()
    where = plans.read(tmp_path / "sweep")["cluster"]
    assert (where["context"], where["namespace"], where["uid"]) == ("home", "team", "here")
    made = state_of(cluster)["made"]
    for option in ("namespace", "context"):
        with pytest.raises(ConfigError) as refused:
            launched(f"hydra.launcher.{option}=other")
        assert (refused.value.path, refused.value.value) == (f"hydra.launcher.{option}", "other")
    moved(namespace="other", context="other")
    launched("seed=0")
    moved(uid="of another cluster")
    with pytest.raises(ConfigError) as refused:
        launched("seed=0")
    assert (refused.value.path, refused.value.value) == ("hydra.launcher.context", "home")
    assert state_of(cluster)["made"] == made


def test_name_of_another_packages_launcher_is_left_to_it() -> None:
    for stored in ([], ["theirs"]):
        known = object.__new__(ConfigStore)  # ConfigStore() is the one that Hydra uses
        known.repo = {}
        for target in stored:
            known.store("kubernetes", {"_target_": target}, group="hydra/launcher")
        launcher.store(known)
        named = [known.load(f"hydra/launcher/{name}.yaml").node for name in ("kubernetes", "blockwright_kubernetes")]
        assert [node._target_ == "theirs" for node in named] == [bool(stored), False]
