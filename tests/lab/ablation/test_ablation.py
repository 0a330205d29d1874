"""Ablations: what a definition says, what is planned of it, that all of conf/ablation run, and what is refused."""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from warm import Warm

from blockwright.lab.ablation import __main__ as command
from blockwright.lab.ablation import definition, forecast, planning
from blockwright.lab.ablation.__main__ import main, read
from blockwright.lab.match import request
from blockwright.lab.match.budgets import BUDGETS, measure
from blockwright.lab.match.knobs import KNOBS
from blockwright.lab.match.sizing import Match
from blockwright.lab.sweep import plan as plans
from blockwright.registry import REFUSED, ConfigError, plugins
from blockwright.registry.command import run_command
from blockwright.registry.reading import keys
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.execute import execute
from blockwright.training.entry.preflight import preflight

pytestmark = pytest.mark.xdist_group("ablation")  # its fixture runs a whole program, once

ROOT = Path(__file__).resolve().parents[3]
ARMS = {"one": None, "two": "model/attention=gqa"}
MINIMAL = {"about": "a claim", "baseline": "one", "tune": None, "arms": ARMS}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """The path of a definition: the smallest there is, with these keys."""

    def make(**keys: Any) -> str:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in {**MINIMAL, **keys}.items() if v is not ...}, sort_keys=False))
        return str(file)

    return make


@pytest.fixture(scope="session")
def shrunk(small: list[str]) -> list[str]:
    """Overrides under which a job of a definition takes a second."""
    return [*small, "model.max_positions=128", "trainer.max_steps=2", "callbacks.report.sample_tokens=0"]


@functools.cache
def composed(overrides: tuple[str, ...], output_dir: str | None) -> Any:
    return compose_config(overrides, output_dir=output_dir)


@pytest.fixture(autouse=True)
def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To compose takes longest: what plans have in common is composed for all of them."""
    monkeypatch.setattr(planning, "compose_config", lambda o, output_dir=None: composed(tuple(o), output_dir))


# --- where they are ---------------------------------------------------------------------------------------------------


def test_plug_in_offers_definitions_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "offered_ablations"
    folder.mkdir()
    (folder / "theirs.yaml").write_text(yaml.safe_dump(MINIMAL))
    (folder / "balance_losses.yaml").write_text(yaml.safe_dump(MINIMAL))
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("x", folder.name, definition.ENTRY_POINTS)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == definition.ENTRY_POINTS else [])
    assert "theirs" in definition.names() and definition.read("theirs").about == "a claim"
    with pytest.raises(ConfigError, match="several ablations have this name"):
        definition.read("balance_losses")


def test_data_that_does_not_say_its_length_is_planned_by_steps_alone(write: Callable[..., str]) -> None:
    """As of a plug-in whose windows follow from other settings."""
    assert planning._tokens({"data": {"batch_size": 4}, "trainer": {"max_steps": 9}, "train": True}) is None
    with pytest.raises(ConfigError, match=r"no data\.sequence_length") as error:
        planning._steps(definition.read(write(tokens=1e6)), planning._tokens_per_step({"data": {}, "trainer": {}}))
    assert "trainer.max_steps=N" in error.value.remedy


# --- definitions ------------------------------------------------------------------------------------------------------


def test_definition_says_what_its_file_says(write: Callable[..., str]) -> None:
    arms = {"one": None, "two": ["a=1", "b=2"], "three": {"overrides": "c=3", "by": "d_expert", "target": 5e6}}
    more = {"seeds": 2, "tokens": 2e6, "lr": [0.01, 1e-3], "workers": 3, "metric": "m", "direction": "maximize"}
    file = write(arms=arms, base=["seed=4"], budget={"match": "params", "by": "d_ff", "tol": 0.1}, **more)
    read = definition.read(file)
    assert (read.name, read.about, read.base, read.baseline) == ("mine", "a claim", ("seed=4",), "one")
    assert [arm.overrides for arm in read.arms.values()] == [(), ("a=1", "b=2"), ("c=3",)]
    assert read.budget and read.budget.budget == "params"
    three = read.arms["three"]
    assert three.match and (three.match.budget, three.match.by, three.match.tol) == ("params", "d_expert", 0.1)
    assert three.target == 5e6 and read.arms["two"].match is None
    assert (read.seeds, read.tokens, read.lr, read.workers) == ((0, 1), 2_000_000, (0.01, 0.001), 3)
    assert (read.metric, read.direction) == ("m", "maximize")


def test_command_line_counts_more_than_the_file(write: Callable[..., str]) -> None:
    file = write(budget={"match": "params", "by": "d_ff"}, seeds=1)
    changes = {"seeds": "[3,5]", "tol": "0.2", "by": "d_model", "lr": "[0.1,0.2]", "baseline": "two", "tokens": "3e6"}
    read = definition.read(file, changes)
    assert (read.seeds, read.lr, read.baseline, read.tokens) == ((3, 5), (0.1, 0.2), "two", 3_000_000)
    assert read.budget and (read.budget.budget, read.budget.by, read.budget.tol) == ("params", "d_model", 0.2)


@pytest.mark.parametrize("changes", [{"tune": "null"}, {"lr": "[0.01,0.02]"}], ids=str)
def test_what_tunes_nothing_has_no_judge_either(write: Callable[..., str], changes: dict[str, str]) -> None:
    file = write(tune=5, tuned_by="val/perplexity")
    assert definition.read(file).tuned_by == definition.read(file, {"tune": "3"}).tuned_by == "val/perplexity"
    assert definition.read(file, changes).tuned_by is None


def test_grid_is_every_combination(write: Callable[..., str]) -> None:
    groups = {"model/attention": ["mha", "gqa"], "optimizer.lr": [0.01, 0.02]}
    read = definition.read(write(arms=..., baseline=..., grid=groups))
    assert list(read.arms) == ["mha+0.01", "mha+0.02", "gqa+0.01", "gqa+0.02"] and read.baseline == "mha+0.01"
    assert read.arms["gqa+0.02"].overrides == ("model/attention=gqa", "optimizer.lr=0.02")


def test_grid_of_values_that_are_no_words_is_in_hydras_grammar(write: Callable[..., str]) -> None:
    values = [None, True, {"name": "expert", "alpha": 0.01}, [1, None]]
    read = definition.read(write(arms=..., baseline=..., grid={"k": values}))
    assert [arm.overrides for arm in read.arms.values()] == [
        ("k=null",),
        ("k=true",),
        ("k={name:expert,alpha:0.01}",),
        ("k=[1,null]",),
    ]


def test_names_that_yaml_takes_for_numbers_are_names(write: Callable[..., str]) -> None:
    read = definition.read(write(arms={1: None, 2: "x=1"}, baseline=1))
    assert read.baseline == "1" and list(read.arms) == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "told"), [("5", "must be a mapping"), ("baseline: [a]\narms: {a: x=1, b: y=1}", "name of an arm")]
)
def test_file_that_says_something_else_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        definition.read(str(tmp_path / "mine.yaml"))


def test_file_that_is_not_there_is_called_a_file() -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        definition.read("nowhere/mine.yaml")


RECIPE = {"a": "x=1", "b": ["y=2", "z=3"], "c": "w=4"}


def test_leave_one_out_takes_one_change_away_from_all(write: Callable[..., str]) -> None:
    read = definition.read(write(arms=..., baseline=..., leave_one_out=RECIPE))
    assert read.baseline == "everything"
    assert {name: arm.overrides for name, arm in read.arms.items()} == {
        "everything": ("x=1", "y=2", "z=3", "w=4"),
        "without a": ("y=2", "z=3", "w=4"),
        "without b": ("x=1", "w=4"),
        "without c": ("x=1", "y=2", "z=3"),
    }


def test_staircase_adds_one_change_after_another(write: Callable[..., str]) -> None:
    read = definition.read(write(arms=..., baseline=..., staircase=RECIPE))
    assert read.baseline == "start"
    assert {name: arm.overrides for name, arm in read.arms.items()} == {
        "start": (),
        "+ a": ("x=1",),
        "+ b": ("x=1", "y=2", "z=3"),
        "+ c": ("x=1", "y=2", "z=3", "w=4"),
    }


def test_generated_arms_stand_beside_written_ones(write: Callable[..., str]) -> None:
    read = definition.read(write(arms={"mine": "q=1"}, baseline=..., staircase=RECIPE))
    assert list(read.arms) == ["mine", "start", "+ a", "+ b", "+ c"] and read.baseline == "start"


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_for_every_arm_rate_and_seed(write: Callable[..., str], shrunk: list[str]) -> None:
    name = "it's a,b (1)"
    file = Path(write(lr=[0.01, 0.02], seeds=[0, 7], base=["model/norm=layernorm"], tokens=1000))
    file = file.rename(file.with_name(f"{name}.yaml"))
    plan = planning.make(definition.read(str(file)), [*shrunk, "model/attention=mqa"])
    assert [(j["job"], j["arm"], j["lr"], j["seed"]) for j in plan.jobs] == [
        (i, arm, lr, seed)
        for i, (arm, lr, seed) in enumerate((a, r, s) for a in ("one", "two") for r in (0.01, 0.02) for s in (0, 7))
    ]
    config = compose_config(plan.jobs[7]["overrides"])
    assert plan.steps == 2  # they are given, so that tokens become none
    assert (config.optimizer.lr, config.seed, config.task_name) == (0.02, 7, name)
    assert (config.model.attention.name, config.model.norm.name) == ("gqa", "layernorm")
    # An override for all arms does not undo what makes one.
    assert [sized.arm.model["attention"]["name"] for sized in plan.arms] == ["mqa", "gqa"]


@pytest.mark.slow
def test_arms_of_other_batches_see_as_many_tokens(write: Callable[..., str], shrunk: list[str]) -> None:
    without = [o for o in shrunk if not o.startswith("trainer.max_steps")]
    plan = planning.make(definition.read(write(tokens=6400, arms={"one": None, "two": "data.batch_size=8"})), without)
    steps = {job["arm"]: [o for o in job["overrides"] if o.startswith("trainer.max_steps")] for job in plan.jobs}
    assert plan.tokens_per_step == 64 and steps == {"one": ["trainer.max_steps=100"], "two": ["trainer.max_steps=25"]}
    assert plan.tokens == {"one": 6400, "two": 6400}
    with pytest.raises(ConfigError, match="one step of arm two \\(256 tokens"):
        planning.make(definition.read(write(tokens=128, arms={"one": None, "two": "data.batch_size=8"})), without)


@pytest.mark.slow
def test_figure_of_a_split_that_is_not_measured_is_refused(write: Callable[..., str], shrunk: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"arm one.*test/loss.*because of test=false|test/loss.*because of test=false"
    ):
        planning.make(definition.read(write(metric="test/loss")), [*shrunk, "test=false"])


@pytest.mark.parametrize("word", ["seed=1", "hydra.run.dir=x", "hydra/launcher=joblib", "hparams_search=optuna"])
def test_what_the_ablation_decides_for_each_job_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="is set by the ablation for each job"):
        read(["balance_losses", word])


def test_log_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refused:
        plans.begin(f"{tmp_path}/file/logs", "ablation", "mine", {})
    assert refused.value.path == "paths.log_dir"


@pytest.mark.slow
def test_jobs_are_what_was_matched(write: Callable[..., str], shrunk: list[str]) -> None:
    arms = {"one": "model/attention=mha", "two": "model/attention=mqa", "three": {"overrides": [], "by": "d_expert"}}
    file = write(arms=arms, budget={"match": "params", "by": "d_ff", "tol": 0.002})
    plan = planning.make(definition.read(file), shrunk)
    plain = json.loads(json.dumps(plan.as_plain(["python", "-m", "x", "a b"])))
    assert plain["command"] == "python -m x 'a b'" and plain["kind"] == "ablation"
    assert [arm["baseline"] for arm in plain["arms"]] == [True, False, False]
    base = plain["arms"][0]["figures"]
    for arm, job in zip(plain["arms"], plain["jobs"], strict=True):
        if arm["name"] == "two":
            model = preflight(compose_config(job["overrides"], output_dir="."))["model"]
            assert vars(measure(model, 32)) == arm["figures"]
        assert abs(arm["figures"]["params"] / base["params"] - 1) <= 0.002
    assert "model.ffn.shared.d_ff" in plain["arms"][1]["match"]["changed"]
    assert plain["arms"][2]["match"]["by"] == "d_expert"


# --- the definitions that are there -----------------------------------------------------------------------------------


TWO = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
PAGES = [*TWO, "scheduler.warmup=1", "callbacks.pictures.conversations=8"]
PAGES += ["data.corpus.train=64", "data.corpus.held_out=16"]
# A part of the definitions; None: as ``shrunk``. The others are small already, and their data fits no other model.
TRAINED = {
    "experts": None,
    "mtp_drafts": None,
    "pages": PAGES,
    "compressed": TWO,
    "loops": [*TWO, "callbacks.skills.samples=1"],
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.slow
def test_every_arm_of_a_definition_takes_two_steps(name: str, shrunk: list[str], tmp_path: Path) -> None:
    read = definition.read(name, {"seeds": "1"})
    plan = planning.make(read, [*(TRAINED[name] or shrunk), f"paths.data_dir={tmp_path}/data"])
    for job in plan.jobs:
        folder = tmp_path / str(job["job"])
        overrides = [*job["overrides"], "logger=none", "~callbacks.report", "~callbacks.checkpoint"]
        metrics = execute(preflight(compose_config(overrides, output_dir=str(folder))))
        assert 0 <= metrics[read.metric] < 10, job["arm"]


@pytest.mark.slow
def test_arms_after_surgery_keep_what_the_trained_model_knows(
    as_it_stands: Callable[[str], planning.Plan], small: list[str], tmp_path: Path
) -> None:
    jobs = {job["arm"]: job for job in as_it_stands("swap_and_keep").jobs if job["seed"] == 0}
    quick = [o for o in small if not o.startswith(("model.", "trainer."))]
    quick += ["logger=none", "~callbacks.report", "data.batch_size=16", "++trainer.limit_val_batches=2"]
    found = {}
    for name in ("mha", "mla", "mla scratch", "moe", "kda"):
        job, steps = jobs[name], 60 if name == "mha" else 4
        start = [f"init_from={tmp_path / str(job['after'])}"] if "after" in job else []
        start += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
        config = compose_config([*job["overrides"], *quick, *start], output_dir=str(tmp_path / str(job["job"])))
        found[name] = execute(preflight(config))["val/loss"]
    assert max(found["mla"], found["moe"]) < found["mla scratch"] - 0.5


@pytest.fixture(scope="module")
def as_it_stands(kernel_pages: str) -> Callable[[str], planning.Plan]:
    """The plan of a definition of conf/ablation, made once."""

    def make(name: str) -> planning.Plan:
        read = definition.read(name)
        folder = [kernel_pages] if "experiment=mixture" in read.base else []
        return planning.make(replace(read, base=(*read.base, *folder)))

    return functools.cache(make)


@pytest.mark.slow
def test_every_definition_says_its_claim() -> None:
    texts = {name: definition.FILES.known()[name][0].read_text() for name in definition.names()}
    assert not [
        name
        for name, text in texts.items()
        if not (text.startswith("# ") and "arXiv" in text and 20 < len(definition.about(name)) <= 100)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", definition.names()[::2])
def test_arms_of_a_definition_are_matched_as_they_stand(
    name: str, as_it_stands: Callable[[str], planning.Plan]
) -> None:
    plan = as_it_stands(name)
    size = plan.arms[0].figures.params
    tokens = [forecast.jobs_of(plan, arm) * (of or 0) for arm, of in plan.tokens.items()]
    assert sum(tokens) * max(size, 4e5) < 20e6 * 3e6  # an hour on two cores
    budget = plan.definition.budget
    other_models = name in ("swap_and_keep", "mtp_drafts")  # on purpose: made of a trained model, or for training
    for sized in (each for each in plan.arms if budget or not (other_models or "mla" in each.arm.name)):
        off = sized.residual[budget.budget if budget else "params"]
        assert off is not None and abs(off) <= (budget.tol if budget else 0)


@pytest.mark.parametrize(
    ("arm", "path"),
    [
        ({"init_from": "two"}, "arms.two.init_from"),
        ({"against": "three"}, "arms.two.against"),
        ({"like": ["one", "none"]}, "arms.two.like"),
    ],
)
def test_an_arm_can_only_build_on_one_above_it(write: Callable[..., str], arm: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match="above it") as caught:
        definition.read(write(arms={"one": ["a=1"], "two": arm, "three": ["b=2"]}))
    assert caught.value.path == path


def test_an_arm_like_another_has_its_overrides_before_its_own(write: Callable[..., str]) -> None:
    arms = {"one": ["a=1"], "two": ["b=2"], "three": {"like": ["two", "one"], "overrides": ["b=3"], "against": "two"}}
    read = definition.read(write(arms=arms, baseline="one", also=["x/y"]))
    assert read.arms["three"].overrides == ("b=2", "a=1", "b=3") and read.also == ("x/y",)


@pytest.mark.slow
def test_an_arm_that_others_only_start_from_is_not_compared(write: Callable[..., str], shrunk: list[str]) -> None:
    """It need not have the metric, so it is in the jobs but in no comparison."""
    arms = {
        "first": {"compared": False},
        "one": {"init_from": "first"},
        "two": {"init_from": "first", "overrides": "optimizer.lr=0.02"},
    }
    written = planning.make(definition.read(write(arms=arms, seeds=2)), shrunk).as_plain([])
    assert [arm["name"] for arm in written["arms"]] == ["one", "two"]
    jobs = {job["job"]: job for job in written["jobs"]}
    assert len(jobs) == 6 and {jobs[job["after"]]["arm"] for job in jobs.values() if "after" in job} == {"first"}
    assert all(jobs[job["after"]]["seed"] == job["seed"] for job in jobs.values() if "after" in job)


@pytest.mark.parametrize(
    ("value", "change", "path"), [(False, {}, "baseline"), ("no", {"baseline": "two"}, "arms.one.compared")]
)
def test_the_baseline_is_compared(write: Callable[..., str], value: Any, change: dict[str, str], path: str) -> None:
    arms = {"one": {"compared": value}, "two": ["a=1"]}
    with pytest.raises(ConfigError) as caught:
        definition.read(write(arms=arms, **{"baseline": "one", **change}))
    assert caught.value.path == path


def test_one_seed_may_be_named(write: Callable[..., str]) -> None:
    assert definition.read(write(arms={"one": None, "two": ["a=1"]}), {"seeds": "[7]"}).seeds == (7,)


@pytest.mark.slow
def test_deepseek_v2s_four_attentions_are_at_equal_parameters(as_it_stands: Callable[[str], planning.Plan]) -> None:
    plan = as_it_stands("deepseek_v2_attention")
    assert [sized.arm.name for sized in plan.arms] == ["mha", "gqa", "mqa", "mla"] and len(plan.jobs) == 20  # tries
    assert max(abs(sized.residual["params"] or 0) for sized in plan.arms) <= 0.005
    cache = [sized.residual["cache_bytes"] for sized in plan.arms]
    assert cache == [0.0, -0.75, -0.875, -0.71875]


@pytest.mark.slow
def test_whole_ablation_from_one_command(
    write: Callable[..., str], shrunk: list[str], warm: Warm, environment: dict[str, str], tmp_path: Path
) -> None:
    file = write(budget={"match": "params", "by": "d_ff", "tol": 0.01}, workers=2)
    words = [file, *shrunk, "model.n_layers=1", f"paths.log_dir={tmp_path}/logs", "seeds=1"]
    done = warm.run("-m", "blockwright.lab.ablation", *words, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "logs" / "ablation" / "mine").iterdir()
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["command"].startswith("blockwright ablate ") and len(plan["jobs"]) == 2 == plan["workers"]
    for job, arm in zip(plan["jobs"], plan["arms"], strict=True):
        results = json.loads((folder / str(job["job"]) / "results.json").read_text())
        assert results["status"] == "completed" and results["parameters"] == arm["figures"]["params"]
    with (folder / "summary.csv").open(newline="") as table:
        assert len(list(csv.DictReader(table))) == 2
    assert (folder / "report" / "index.html").is_file() and "report/index.html" in done.stdout


# --- the command ------------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run_command(main, words)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_without_a_name_it_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys)
    assert code == 0
    assert not [name for name in definition.names() if name not in out]


def test_plan_only_shows_and_writes_and_starts_nothing(
    write: Callable[..., str], shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(seeds=3)
    code, out, _ = answer(capsys, file, *shrunk, f"paths.log_dir={tmp_path}/logs", "--plan-only")
    assert code == 0
    assert (
        "one (baseline)" in out
        and "6 jobs compare 2 arms × 3 seeds; 2 steps of 64 tokens each" in out
        and "nothing was started" in out
    )
    (folder,) = (tmp_path / "logs" / "ablation" / "mine").iterdir()
    assert [f.name for f in folder.iterdir()] == ["plan.json"]


def test_documented_commands_and_keys_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/ablate.md").read_text()
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^blockwright (.+)$", page, re.M)]
    assert {words[0] for words in commands} == {"match", "ablate"} and len(commands) >= 8
    for program, *words in commands:
        if program == "match":
            assert len(request.read(words).arms) > 1
        elif words:
            asked = command.read(words)
            definition.read(asked.name, asked.changes)
    example = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert example
    file = tmp_path / "mine.yaml"
    file.write_text(example[1])
    assert list(definition.read(str(file)).arms) == ["mha", "gqa", "wide"]
    told = [*BUDGETS, *KNOBS, *definition.KEYS, *keys(Match), *keys(definition.ArmSpec)]
    assert all(re.search(rf"\b{word}\b", page) for word in told)


# what is written: its keys, words of the command → where the message begins
MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "one try": ({"tune": 1}, [], "tune = 1"),
    "a hundred tries": ({}, ["tune=100"], "tune = 100"),
    "tune that is no number": ({"tune": "much"}, [], "tune = much"),
    "tuned arm that starts from another": (
        {"tune": 5, "arms": {"one": None, "two": {"overrides": "model.gating.top_k=1", "init_from": "one"}}},
        [],
        "tune = ",
    ),
    "seeds and a difference": ({"seeds": 3, "see": 0.01}, [], "see = 0.01"),
    "a difference and hours": ({}, ["see=0.01", "hours=1"], "hours = 1"),
    "difference whose noise is not known": ({}, ["see=0.01"], "see = 0.01"),
    "one pair": ({}, ["see=0.01", "pairs=1"], "pairs = 1"),
    "seeds of no tries": ({"lr": [0.01], "tune_seeds": 2}, [], "tune_seeds = 2"),
    "no time": ({}, ["hours=0"], "hours = 0"),
    "until what there is not": ({}, ["until=better"], "until = better"),
    "spending without until": ({}, ["spend=pocock"], "spend = "),
    "looks that fall": ({}, ["until=verdict", "looks=[8,4]"], "looks = "),
    "look at too many": ({}, ["until=verdict", "looks=[4,4000]"], "looks = "),
    "spending that is none": ({}, ["until=verdict", "spend=all"], "spend = all"),
    "until of several rates": ({"lr": [0.1, 0.2]}, ["until=verdict"], "until = verdict"),
    "no margin": ({}, ["within=0"], "within = 0"),
    "solved without a threshold": ({"solved": {"metric": "val/loss"}}, [], "solved.at = null"),
    "solved on the command line": ({}, ["solved=1"], "solved = 1"),
    "no arms": ({"arms": {}}, [], "arms = "),
    "baseline that is no arm": ({"baseline": "tow"}, [], "baseline = tow"),
    "unknown key": ({"seed": 3}, [], "seed = 3"),
    "unknown key of a budget": ({"budget": {"mach": "params"}}, [], "budget.mach = params"),
    "budget without a knob": ({"budget": {"match": "params"}}, [], "budget.by = null"),
    "no such knob": ({"budget": {"match": "params", "by": "d_f"}}, [], "budget.by = d_f"),
    "part of a token": ({"tokens": 1000.5}, [], "tokens = 1000.5"),
    "no seeds": ({"seeds": 0}, [], "seeds = 0"),
    "a seed twice": ({"seeds": [1, 1]}, [], "seeds = [1, 1]"),
    "no tokens": ({"tokens": 0}, [], "tokens = 0"),
    "tokens of less than a step": ({"tokens": 63}, [], "tokens = 63"),
    "arm that is no list": ({"arms": {"one": None, "two": 3}}, [], "arms.two.overrides = 3"),
    "arm that is no block": (
        {"arms": {"one": None, "two": "model/attention=gqaa"}},
        [],
        "arm two: model/attention = gqaa",
    ),
    "two arms that are the same": ({"arms": {"one": None, "two": "model/attention=mla"}}, [], "arms = two"),
    "two arms of one name": ({"staircase": {"a": "x=1"}, "arms": {"start": None, "other": "y=1"}}, [], "arms = start"),
    "grid with a value twice": (
        {"arms": ..., "grid": {"model/attention": ["mha", "mha"]}},
        [],
        "grid.model/attention = ",
    ),
    "target without a budget": (
        {"arms": {"one": None, "two": {"overrides": "x=1", "target": 5}}},
        [],
        "arms.two.target = 5",
    ),
    "seed on the command line": ({}, ["seed=3"], "seed = 3"),
    "run folder": ({}, ["hydra.run.dir=x"], "hydra.run.dir = x"),
    "unknown flag": ({}, ["--plan"], "command line = --plan"),
    "what train.py would refuse": ({}, ["trainer.val_check_interval=0"], "arm one: trainer.val_check_interval = 0"),
}


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where logs would go."""
    return tmp_path_factory.mktemp("nothing") / "logs"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_message_and_nothing_is_started(
    mistake: str,
    write: Callable[..., str],
    shrunk: list[str],
    nowhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys, words, where = MISTAKES[mistake]
    given = [o for o in shrunk if not o.startswith("trainer.max_steps")]  # tokens say it
    file = write(**{"tokens": 128, **keys})
    code, out, err = answer(capsys, file, *given, f"paths.log_dir={nowhere}", *words)
    assert code == REFUSED and out == "", err
    assert err.startswith(f"error: {where}") and len(err.splitlines()) == 3
    assert not nowhere.exists()


def test_name_that_is_none_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = answer(capsys, "deepseek_v2_atention")
    assert code == REFUSED and "Did you mean 'deepseek_v2_attention'" in err


def test_train_py_says_who_runs_an_ablation() -> None:
    with pytest.raises(ConfigError, match=r"blockwright ablate balance_losses"):
        compose_config(["ablation=balance_losses"])


def test_budget_of_the_command_line_replaces_none_of_the_file(write: Callable[..., str]) -> None:
    match = definition.read(write(budget=None), {"match": "params", "by": "d_ff"}).budget
    assert match is not None and (match.budget, match.by) == ("params", "d_ff")


def test_a_name_given_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("baseline: a\narms:\n  a: x=1\n  b: x=2\n  a: x=3\n")
    with pytest.raises(ConfigError, match="two arms cannot have one name") as refused:
        definition.read(str(file))
    assert refused.value.path == f"{file}:5"


@pytest.mark.parametrize("text", ["- a\n", "arms: [\n", "", "arms: ${nowhere}\n"])
def test_file_that_is_no_definition_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        definition.read(str(file))
