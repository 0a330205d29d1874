"""Ablations: what a definition says, what is planned of it, that those of conf/ablation run, and what is refused."""

import csv
import functools
import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from blockwright.lab.ablation import definition, forecast, planning
from blockwright.lab.ablation.__main__ import main, read
from blockwright.lab.match.sizing import measure
from blockwright.lab.sweep import plan as plans
from blockwright.registry import REFUSED, ConfigError, plugins
from blockwright.registry.command import run_command
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.execute import execute
from blockwright.training.entry.preflight import preflight
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents

pytestmark = pytest.mark.xdist_group("ablation")  # its fixture runs a whole program, once

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = {"about": "a claim", "baseline": "one", "tune": None, "arms": {"one": None, "two": "model/attention=gqa"}}


@pytest.fixture
def write(tmp_path):
    """The path of a definition: the smallest there is, with these keys; one that is … is left out."""

    def make(**keys):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in {**MINIMAL, **keys}.items() if v is not ...}, sort_keys=False))
        return str(file)

    return make


@pytest.fixture(scope="session")
def shrunk(small):
    """Overrides under which a job of a definition takes a second."""
    return [*small, "model.max_positions=128", "trainer.max_steps=2", "callbacks.report.sample_tokens=0"]


@functools.cache
def composed(overrides, output_dir):
    return compose_config(overrides, output_dir=output_dir)


@pytest.fixture(autouse=True)
def compose_once(monkeypatch):
    """To compose takes longest: what plans have in common is composed for all of them."""
    monkeypatch.setattr(planning, "compose_config", lambda o, output_dir=None: composed(tuple(o), output_dir))


def test_plug_in_offers_definitions_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "offered_ablations"
    folder.mkdir()
    for name in ("theirs", "balance_losses"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(MINIMAL))
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("x", folder.name, definition.ENTRY_POINTS)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == definition.ENTRY_POINTS else [])
    assert "theirs" in definition.names() and definition.read("theirs").about == "a claim"
    with pytest.raises(ConfigError):
        definition.read("balance_losses")


def test_data_that_does_not_say_its_length_is_planned_by_steps_alone(write):
    assert planning._tokens({"data": {"batch_size": 4}, "trainer": {"max_steps": 9}, "train": True}) is None
    with pytest.raises(ConfigError) as error:
        planning._steps(definition.read(write(tokens=1e6)), planning._tokens_per_step({"data": {}, "trainer": {}}))
    assert "trainer.max_steps=N" in error.value.remedy


def test_definition_says_what_its_file_says(write):
    arms = {"one": None, "two": ["a=1", "b=2"], "three": {"overrides": "c=3", "by": "d_expert", "target": 5e6}}
    more = {"seeds": 2, "tokens": 2e6, "lr": [0.01, 1e-3], "workers": 3, "metric": "m", "direction": "maximize"}
    found = definition.read(
        write(arms=arms, base=["seed=4"], budget={"match": "params", "by": "d_ff", "tol": 0.1}, **more)
    )
    assert (found.name, found.about, found.base, found.baseline) == ("mine", "a claim", ("seed=4",), "one")
    assert [arm.overrides for arm in found.arms.values()] == [(), ("a=1", "b=2"), ("c=3",)]
    three = found.arms["three"]
    assert (three.match.budget, three.match.by, three.match.tol) == ("params", "d_expert", 0.1)
    assert found.budget.budget == "params" and three.target == 5e6 and found.arms["two"].match is None
    assert (found.seeds, found.tokens, found.lr, found.workers) == ((0, 1), 2_000_000, (0.01, 0.001), 3)
    assert (found.metric, found.direction) == ("m", "maximize")


@pytest.mark.parametrize(
    ("keys", "changes", "expected"),
    [
        ({"seeds": 1}, {"seeds": "[3,5]", "lr": "[0.1,0.2]"}, {"seeds": (3, 5), "lr": (0.1, 0.2)}),
        ({}, {"seeds": "[7]", "baseline": "two", "tokens": "3e6"}, {"seeds": (7,), "baseline": "two", "tokens": 3e6}),
        ({"tune": 5, "tuned_by": "val/x"}, {"tune": "3"}, {"tuned_by": "val/x"}),
        ({"tune": 5, "tuned_by": "val/x"}, {"tune": "null"}, {"tuned_by": None}),
        ({"tune": 5, "tuned_by": "val/x"}, {"lr": "[0.01,0.02]"}, {"tuned_by": None}),
    ],
)
def test_command_line_counts_more_than_the_file(write, keys, changes, expected):
    found = definition.read(write(**keys), changes)
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("written", "changes", "expected"),
    [
        ({"match": "params", "by": "d_ff"}, {"by": "d_model", "tol": "0.2"}, ("params", "d_model", 0.2)),
        (None, {"match": "params", "by": "d_ff", "tol": "0.1"}, ("params", "d_ff", 0.1)),
    ],
)
def test_budget_of_the_command_line_counts_more(write, written, changes, expected):
    match = definition.read(write(budget=written), changes).budget
    assert (match.budget, match.by, match.tol) == expected


RECIPE = {"a": "x=1", "b": ["y=2", "z=3"]}
VALUES = [None, True, {"name": "expert", "alpha": 0.01}, [1, None]]
GENERATED = [  # keys → arms and their overrides, the first of which is the baseline
    ({"grid": {"model/attention": ["mha", "gqa"], "lr": [1]}}, {"mha+1": "model/attention=mha lr=1",
                                                                "gqa+1": "model/attention=gqa lr=1"}),
    ({"leave_one_out": RECIPE}, {"everything": "x=1 y=2 z=3", "without a": "y=2 z=3", "without b": "x=1"}),
    ({"staircase": RECIPE}, {"start": "", "+ a": "x=1", "+ b": "x=1 y=2 z=3"}),
    ({"arms": {"mine": "q=1"}, "staircase": RECIPE}, {"start": "", "mine": "q=1", "+ a": "x=1", "+ b": "x=1 y=2 z=3"}),
    ({"arms": {1: None, 2: "x=1"}, "baseline": 1}, {"1": "", "2": "x=1"}),  # YAML takes these names for numbers
    ({"arms": {"one": "a=1", "two": "b=2", "three": {"like": ["two", "one"], "overrides": "b=3"}}, "baseline": "one"},
     {"one": "a=1", "two": "b=2", "three": "b=2 a=1 b=3"}),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "expected"), GENERATED)
def test_arms_are_generated(write, keys, expected):
    found = definition.read(write(**{"arms": ..., "baseline": ..., **keys}))
    assert {name: " ".join(arm.overrides) for name, arm in found.arms.items()} == expected
    assert found.baseline == next(iter(expected))


def test_grid_of_values_that_are_no_words_is_in_hydras_grammar(write):
    found = definition.read(write(arms=..., baseline=..., grid={"k": VALUES}))
    expected = ["k=null", "k=true", "k={name:expert,alpha:0.01}", "k=[1,null]"]
    assert [*arm_overrides(found)] == expected


def arm_overrides(found):
    return [override for arm in found.arms.values() for override in arm.overrides]


@pytest.mark.slow
def test_a_job_for_every_arm_rate_and_seed(write, shrunk):
    name = "it's a,b (1)"
    file = Path(write(lr=[0.01, 0.02], seeds=[0, 7], base=["model/norm=layernorm"], tokens=1000))
    plan = planning.make(
        definition.read(str(file.rename(file.with_name(f"{name}.yaml")))), [*shrunk, "model/attention=mqa"]
    )
    expected = [(a, r, s) for a in ("one", "two") for r in (0.01, 0.02) for s in (0, 7)]
    assert [(j["job"], j["arm"], j["lr"], j["seed"]) for j in plan.jobs] == [(i, *e) for i, e in enumerate(expected)]
    config = compose_config(plan.jobs[7]["overrides"])
    assert plan.steps == 2  # they are given, so that tokens become none
    assert (config.optimizer.lr, config.seed, config.task_name) == (0.02, 7, name)
    assert (config.model.attention.name, config.model.norm.name) == ("gqa", "layernorm")
    # An override for all arms does not undo what makes one.
    assert [sized.arm.model["attention"]["name"] for sized in plan.arms] == ["mqa", "gqa"]


@pytest.mark.slow
def test_arms_of_other_batches_see_as_many_tokens(write, shrunk):
    without = [o for o in shrunk if not o.startswith("trainer.max_steps")]
    arms = {"one": None, "two": "data.batch_size=8"}
    plan = planning.make(definition.read(write(tokens=6400, arms=arms)), without)
    steps = {job["arm"]: [o for o in job["overrides"] if o.startswith("trainer.max_steps")] for job in plan.jobs}
    assert plan.tokens_per_step == 64 and steps == {"one": ["trainer.max_steps=100"], "two": ["trainer.max_steps=25"]}
    assert plan.tokens == {"one": 6400, "two": 6400}
    with pytest.raises(ConfigError):  # one step of arm two is 256
        planning.make(definition.read(write(tokens=128, arms=arms)), without)


def test_log_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refused:
        plans.begin(f"{tmp_path}/file/logs", "ablation", "mine", {})
    assert refused.value.path == "paths.log_dir"


@pytest.mark.slow
def test_jobs_are_what_was_matched(write, shrunk):
    arms = {"one": "model/attention=mha", "two": "model/attention=mqa", "three": {"overrides": [], "by": "d_expert"}}
    plan = planning.make(
        definition.read(write(arms=arms, budget={"match": "params", "by": "d_ff", "tol": 0.002})), shrunk
    )
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


TWO = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
PAGES = [*TWO, "scheduler.warmup=1", "callbacks.pictures.conversations=8"]
PAGES += ["data.corpus.train=64", "data.corpus.held_out=16"]
# A part of the definitions; None: as ``shrunk``. The others are small already, and their data fits no other model.
TRAINED = {
    "experts": None,
    "mtp_drafts": None,
    "pages": PAGES,
    "compressed": [*TWO, "trainer.limit_val_batches=1", "data.eval_batch_size=2", "callbacks.long_context.samples=2"],
    "loops": [*TWO, "callbacks.skills.samples=1"],
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.slow
def test_every_arm_of_a_definition_takes_two_steps(name, shrunk, tmp_path):
    found = definition.read(name, {"seeds": "1"})
    plan = planning.make(found, [*(TRAINED[name] or shrunk), f"paths.data_dir={tmp_path}/data"])
    for arm, job in {job["arm"]: job for job in reversed(plan.jobs)}.items():  # the first of an arm's tries
        folder = tmp_path / str(job["job"])
        overrides = [*job["overrides"], "logger=none", "~callbacks.report", "~callbacks.checkpoint"]
        metrics = execute(preflight(compose_config(overrides, output_dir=str(folder))))
        assert 0 <= metrics[found.metric] < 10, arm


@pytest.mark.slow
def test_arms_after_surgery_keep_what_the_trained_model_knows(as_it_stands, small, tmp_path):
    jobs = {job["arm"]: job for job in as_it_stands("swap_and_keep").jobs if job["seed"] == 0}
    quick = [o for o in small if not o.startswith(("model.", "trainer."))]
    quick += ["logger=none", "~callbacks.report", "data.batch_size=16", "++trainer.limit_val_batches=2"]
    found = {}
    for name in ("mha", "mla", "mla scratch", "moe"):
        job, steps = jobs[name], 60 if name == "mha" else 4
        start = [f"init_from={tmp_path / str(job['after'])}"] if "after" in job else []
        start += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
        config = compose_config([*job["overrides"], *quick, *start], output_dir=str(tmp_path / str(job["job"])))
        found[name] = execute(preflight(config))["val/loss"]
    assert max(found["mla"], found["moe"]) < found["mla scratch"] - 0.5


@pytest.fixture(scope="module")
def as_it_stands(kernel_pages):
    """The plan of a definition of conf/ablation, made once."""

    def make(name):
        found = definition.read(name)
        folder = [kernel_pages] if "experiment=mixture" in found.base else []
        return planning.make(replace(found, base=(*found.base, *folder)))

    return functools.cache(make)


@pytest.mark.slow
@pytest.mark.parametrize("name", definition.names()[::4])
def test_arms_of_a_definition_are_matched_as_they_stand(name, as_it_stands):
    plan = as_it_stands(name)
    tokens = [forecast.jobs_of(plan, arm) * (of or 0) for arm, of in plan.tokens.items()]
    assert sum(tokens) * max(plan.arms[0].figures.params, 4e5) < 20e6 * 3e6  # an hour on two cores
    budget = plan.definition.budget  # None: nothing is matched, and the plan shows by how much arms differ
    for sized in plan.arms if budget else ():
        off = sized.residual[budget.budget]
        assert off is not None and abs(off) <= budget.tol


@pytest.mark.slow
def test_an_arm_that_others_only_start_from_is_not_compared(write, shrunk):
    two = {"init_from": "first", "overrides": "optimizer.lr=0.02"}
    arms = {"first": {"compared": False}, "one": {"init_from": "first"}, "two": two}
    written = planning.make(definition.read(write(arms=arms, seeds=2)), shrunk).as_plain([])
    assert [arm["name"] for arm in written["arms"]] == ["one", "two"]
    jobs = {job["job"]: job for job in written["jobs"]}
    assert len(jobs) == 6 and {jobs[job["after"]]["arm"] for job in jobs.values() if "after" in job} == {"first"}
    assert all(jobs[job["after"]]["seed"] == job["seed"] for job in jobs.values() if "after" in job)


@pytest.mark.slow
def test_deepseek_v2s_four_attentions_are_at_equal_parameters(as_it_stands):
    plan = as_it_stands("deepseek_v2_attention")
    assert [sized.arm.name for sized in plan.arms] == ["mha", "gqa", "mqa", "mla"] and len(plan.jobs) == 20  # tries
    assert max(abs(sized.residual["params"] or 0) for sized in plan.arms) <= 0.005
    assert [sized.residual["cache_bytes"] for sized in plan.arms] == [0.0, -0.75, -0.875, -0.71875]


@pytest.mark.slow
def test_whole_ablation_from_one_command(write, shrunk, warm, environment, tmp_path):
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


def test_plan_only_writes_the_plan_and_starts_nothing(write, shrunk, tmp_path, capsys):
    assert main([]) == 0 and "balance_losses" in capsys.readouterr().out
    assert main([write(seeds=3), *shrunk, f"paths.log_dir={tmp_path}/logs", "--plan-only"]) == 0
    assert "6 jobs" in capsys.readouterr().out
    (folder,) = (tmp_path / "logs" / "ablation" / "mine").iterdir()
    assert [f.name for f in folder.iterdir()] == ["plan.json"]


def arms(two):
    return {"arms": {"one": None, "two": two}}


MISTAKES = [  # what is written: its keys, words of the command → where the message begins
    ({"tune": 1}, "", "tune = 1"),
    ({}, "tune=100", "tune = 100"),
    ({"tune": "much"}, "", "tune = much"),
    ({"tune": 5, **arms({"overrides": "model.gating.top_k=1", "init_from": "one"})}, "", "tune = "),
    ({"seeds": 3, "see": 0.01}, "", "see = 0.01"),
    ({}, "see=0.01 hours=1", "hours = 1"),
    ({}, "see=0.01", "see = 0.01"),  # whose noise is not known
    ({}, "see=0.01 pairs=1", "pairs = 1"),
    ({"lr": [0.01], "tune_seeds": 2}, "", "tune_seeds = 2"),
    ({}, "hours=0", "hours = 0"),
    ({}, "until=better", "until = better"),
    ({}, "spend=pocock", "spend = "),
    ({}, "until=verdict looks=[8,4]", "looks = "),
    ({}, "until=verdict looks=[4,4000]", "looks = "),
    ({}, "until=verdict spend=all", "spend = all"),
    ({"lr": [0.1, 0.2]}, "until=verdict", "until = verdict"),
    ({}, "within=0", "within = 0"),
    ({"solved": {"metric": "val/loss"}}, "", "solved.at = null"),
    ({}, "solved=1", "solved = 1"),
    ({"arms": {}}, "", "arms = "),
    ({"baseline": "tow"}, "", "baseline = tow"),
    ({"seed": 3}, "", "seed = 3"),
    ({"budget": {"mach": "params"}}, "", "budget.mach = params"),
    ({"budget": {"match": "params"}}, "", "budget.by = null"),
    ({"budget": {"match": "params", "by": "d_f"}}, "", "budget.by = d_f"),
    ({"tokens": 1000.5}, "", "tokens = 1000.5"),
    ({"tokens": 0}, "", "tokens = 0"),
    ({"tokens": 63}, "", "tokens = 63"),  # less than a step
    ({"seeds": 0}, "", "seeds = 0"),
    ({"seeds": [1, 1]}, "", "seeds = [1, 1]"),
    (arms(3), "", "arms.two.overrides = 3"),
    (arms("model/attention=gqaa"), "", "arm two: model/attention = gqaa"),
    (arms("model/attention=mla"), "", "arms = two"),  # as the other
    (arms({"overrides": "x=1", "target": 5}), "", "arms.two.target = 5"),
    (arms({"init_from": "two"}), "", "arms.two.init_from = two"),
    (arms({"against": "three"}), "", "arms.two.against = three"),
    (arms({"like": ["one", "none"]}), "", "arms.two.like = none"),
    ({"arms": {"one": {"compared": False}, "two": ["a=1"]}}, "", "baseline = one"),
    ({"arms": {"one": {"compared": "no"}, "two": ["a=1"]}, "baseline": "two"}, "", "arms.one.compared = no"),
    ({"staircase": {"a": "x=1"}, "arms": {"start": None, "other": "y=1"}}, "", "arms = start"),
    ({"arms": ..., "grid": {"model/attention": ["mha", "mha"]}}, "", "grid.model/attention = "),
    ({}, "seed=3", "seed = 3"),
    ({}, "hydra.run.dir=x", "hydra.run.dir = x"),
    ({}, "hydra/launcher=joblib", "hydra/launcher = joblib"),
    ({}, "hparams_search=optuna", "hparams_search = optuna"),
    ({}, "--plan", "command line = --plan"),
    ({}, "trainer.val_check_interval=0", "arm one: trainer.val_check_interval = 0"),
    ({"metric": "test/loss"}, "test=false", "arm one: metric = test/loss"),
]


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory):
    """Where logs would go."""
    return tmp_path_factory.mktemp("nothing") / "logs"


@pytest.mark.parametrize(("keys", "words", "where"), MISTAKES)
def test_mistake_is_one_message_and_nothing_is_started(keys, words, where, write, shrunk, nowhere, capsys):
    given = [o for o in shrunk if not o.startswith("trainer.max_steps")]  # tokens say it
    file = write(**{"tokens": 128, **keys})
    assert run_command(main, [file, *given, f"paths.log_dir={nowhere}", *words.split()]) == REFUSED
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {where}") and len(err.splitlines()) == 3, err
    assert not nowhere.exists()


def test_name_that_is_none_is_refused_and_train_py_names_the_command():
    for call in (lambda: definition.read("nowhere/mine.yaml"), lambda: read(["deepseek_v2_atention", "seed=1"])):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(ConfigError, match="blockwright ablate balance_losses"):
        compose_config(["ablation=balance_losses"])


NO_DEFINITIONS = ["5", "- a\n", "arms: [\n", "", "arms: ${nowhere}\n", "baseline: [a]\narms: {a: x=1, b: y=1}"]


@pytest.mark.parametrize("text", [*NO_DEFINITIONS, "baseline: a\narms:\n  a: x=1\n  b: x=2\n  a: x=3\n"])
def test_file_that_is_no_definition_is_refused(tmp_path, text):
    (file := tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        definition.read(str(file))
    assert not text.startswith("baseline: a\n") or refused.value.path == f"{file}:5"  # a name given twice


ALSO = ["val/code/loss", "val/web/loss", "data/code/epochs"]
TOKENS = 5 * 2 * 32  # of a job: steps, rows and length


@pytest.fixture
def words(small, tmp_path):
    """A definition of two arms over random shards, and overrides under which a job takes a second."""
    for i, name in enumerate(("code", "web")):
        formats.npy(tmp_path / f"{name}.npy", documents(90, i))
    sources = ",".join(f"{name}:{{files:{tmp_path}/{name}.npy,val_tokens:300}}" for name in ("code", "web"))
    base = ["data=mixture", "data/tokenizer=bytes", f"data.sources={{{sources}}}"]
    late = "data.stages=[{shares:{code:0.2,web:0.8},batches:3},{shares:{code:0.8,web:0.2}}]"
    arms = {"even": "data.stages=[{shares:{code:0.5,web:0.5}}]", "late": late}
    definition = {
        "about": "code late",
        "base": base,
        "baseline": "even",
        "arms": arms,
        "also": ALSO,
        "seeds": 2,
        "tune": None,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(definition))
    quick = [each for each in small if not each.startswith(("data", "trainer", "callbacks.report"))]
    quick += ["data.sequence_length=32", "data.batch_size=2", "data.eval_windows=4", "callbacks.report.sample_tokens=0"]
    steps = ["trainer.max_steps=5", "trainer.val_check_interval=5", "trainer.log_every_n_steps=2"]
    return [str(tmp_path / "mine.yaml"), *quick, *steps, f"paths.log_dir={tmp_path}/logs"]


def folder_of(tmp_path):
    (folder,) = (tmp_path / "logs" / "ablation" / "mine").iterdir()
    return folder


@pytest.mark.slow
def test_figures_of_sources_are_in_results_and_report(words, forked_jobs, tmp_path, capfd):
    assert main(words) == 0, capfd.readouterr()
    folder = folder_of(tmp_path)
    for job, share in enumerate((0.5, 0.5, 0.44, 0.44)):
        metrics = json.loads((folder / str(job) / "results.json").read_text())["metrics"]
        assert metrics["data/code/tokens"] + metrics["data/web/tokens"] == TOKENS  # of every step, logged or not
        assert metrics["data/code/tokens"] == pytest.approx(share * TOKENS, abs=64)
        mean = (metrics["val/code/loss"] + metrics["val/web/loss"]) / 2
        assert metrics["val/loss"] == pytest.approx(mean, rel=1e-5)
    page = (folder / "report" / "index.html").read_text()
    assert all(name in page for name in ALSO)
