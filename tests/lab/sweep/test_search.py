"""A search that is killed at any moment and resumed is the one that never stopped. Whole ones:
tests/test_sweeps.py."""

import json
import math
from types import SimpleNamespace

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.search import Search, check_packages, check_space, choices, consecutive, ends, read_space
from blockwright.lab.sweep.study import open_study
from blockwright.registry import ConfigError
from blockwright.registry.folder import write_json
from blockwright.training.result import RESULTS

pytestmark = pytest.mark.xdist_group("search")  # its fixture is slow to set up

SAMPLER = {"_target_": "optuna.samplers.TPESampler", "seed": 0, "n_startup_trials": 2}
CONFIG = {"optimized_metric": "val/loss", "direction": None, "callbacks": {}, "test": False, "data": {}, "trainer": {},
          "task": {"name": "causal_lm"}}  # fmt: skip
SPACE = ["x=interval(0.0, 1.0)", "name=choice(a, b, c)"]


class Killed(BaseException):
    """What a test does to a search instead of SIGKILL."""


class Launcher:
    """Computes what a job would: (x - 0.3)², more for c; a job leaves its results, and may be killed before or after.

    Args:
        sweep: folder
        before, after: number of the job at which the search is killed
    """

    def __init__(self, sweep, before=-1, after=-1):
        self.sweep, self.before, self.after = sweep, before, after
        self.launched = []

    def launch(self, overrides, initial_job_idx):
        returned = []
        for number, given in enumerate(overrides, initial_job_idx):
            self.launched.append((number, tuple(given)))
            if number == self.before:
                raise Killed
            returned.append(SimpleNamespace(return_value=self.run(number, dict(o.split("=", 1) for o in given))))
            if number == self.after:
                raise Killed
        return returned

    def run(self, number, given):
        folder = self.sweep / str(number)
        folder.mkdir(exist_ok=True)
        value = (float(given["x"]) - 0.3) ** 2 + (given["name"] == "c")
        results = {"status": "completed", "metrics": {"val/loss": value}}
        if given["name"] == "b":  # a pruned trial: reported by its own process
            study = open_study(self.sweep, plans.read(self.sweep), checked=True)
            study._storage.set_trial_intermediate_value(study.trials[number]._trial_id, 1, value)
            results["status"] = "pruned"
        write_json(folder / RESULTS, results)
        return value


def search(sweep, launcher, n_trials=7, n_jobs=2, **more):
    settings = {"sampler": OmegaConf.create(SAMPLER), "storage": None, "study_name": None, "params": None}
    settings |= {"n_trials": n_trials, "n_jobs": n_jobs, **more}
    made = Search(**settings)
    made.config = OmegaConf.create({"hydra": {"sweeper": {"sampler": SAMPLER}}})
    made.folder, made.launcher = sweep, launcher
    made.resumed = plans.is_resumed(sweep)
    made._composed = lambda overrides: OmegaConf.create(CONFIG)
    return made


@pytest.fixture
def sweep(tmp_path):
    study = {"name": "s", "storage": None}
    plans.write(tmp_path / "sweep", {"kind": "search", "metric": "val/loss", "direction": "minimize", "study": study})
    return tmp_path / "sweep"


def trials_of(sweep):
    study = open_study(sweep, plans.read(sweep))
    return [(t.number, t.state.name, t.value, t.params, t.intermediate_values) for t in study.trials]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trials of a search that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    study = {"name": "s", "storage": None}
    plans.write(folder, {"kind": "search", "metric": "val/loss", "direction": "minimize", "study": study})
    search(folder, Launcher(folder)).sweep(SPACE)
    return trials_of(folder)


def test_search_tries_as_many_as_asked_and_learns(whole):
    assert [number for number, *_ in whole] == list(range(7))
    assert {state for _, state, *_ in whole} == {"COMPLETE", "PRUNED"}
    assert all(len(steps) == (state == "PRUNED") for _, state, _, _, steps in whole)
    assert len({tuple(params.items()) for *_, params, _ in whole}) == 7


@pytest.mark.slow
@pytest.mark.parametrize("moment", [{"before": 4}, {"after": 4}])
def test_killed_search_that_resumes_is_the_one_that_never_stopped(moment, sweep, whole, monkeypatch):
    killed = Launcher(sweep, **moment)
    with pytest.raises(Killed):
        search(sweep, killed).sweep(SPACE)
    monkeypatch.setenv(plans.RESUMED, str(sweep))
    again = Launcher(sweep)
    search(sweep, again).sweep(SPACE)
    assert trials_of(sweep) == whole
    ended = {number for number, _ in killed.launched} - {moment.get("before", -1)}
    assert ended.isdisjoint(number for number, _ in again.launched)  # what had its results did not run again
    assert sorted(ended | {number for number, _ in again.launched}) == list(range(7))


@pytest.mark.slow
def test_trial_that_was_running_resumes_from_its_own_checkpoint(sweep, monkeypatch, tmp_path):
    from blockwright.training.checkpoints.atomic import write_file

    killed = Launcher(sweep, before=2)
    with pytest.raises(Killed):
        search(sweep, killed, n_trials=4, n_jobs=1).sweep(SPACE)
    write_file({"a": 1}, sweep / "2" / "checkpoints" / "last.ckpt")
    monkeypatch.setenv(plans.RESUMED, str(sweep))
    again = Launcher(sweep)
    search(sweep, again, n_trials=4, n_jobs=1).sweep(SPACE)
    assert [number for number, _ in again.launched] == [2, 3]
    expected = (*killed.launched[-1][1], f"ckpt_path={sweep}/2/checkpoints/last.ckpt")
    assert again.launched[0][1] == expected
    before, none = trials_of(sweep), Launcher(sweep)
    search(sweep, none, n_trials=4, n_jobs=1).sweep(SPACE)
    assert none.launched == [] and trials_of(sweep) == before  # it has ended


@pytest.mark.slow
def test_failed_trial_is_told_as_the_worst_and_never_the_best(sweep, monkeypatch):
    of_reward = {"optimized_metric": "val/accuracy", "task": {"name": "reward"}}
    monkeypatch.setitem(globals(), "CONFIG", {**CONFIG, **of_reward})

    class Failing(Launcher):
        def run(self, number, given):
            return math.nan if number == 1 else super().run(number, {**given, "name": "a"})

    search(sweep, Failing(sweep), n_trials=3, n_jobs=1).sweep(SPACE)
    assert trials_of(sweep)[1][1:3] == ("COMPLETE", -math.inf)
    best = OmegaConf.load(sweep / "optimization_results.yaml")
    assert best.best_job != 1 and math.isfinite(best.best_value)
    values = [trial[2] for trial in trials_of(sweep)]
    assert best.best_value == max(values)
    assert open_study(sweep, plans.read(sweep)).best_value == best.best_value


@pytest.mark.slow
def test_study_of_others_trials_is_shared_but_not_run(sweep, tmp_path):
    study = {"name": "s", "storage": f"sqlite:///{tmp_path}/shared.db"}
    for name in ("one", "two"):
        folder = tmp_path / name
        plans.write(folder, {"kind": "search", "metric": "val/loss", "direction": "minimize", "study": study})
        launcher = Launcher(folder)
        search(folder, launcher, n_trials=2).sweep(SPACE)
        assert [number for number, _ in launcher.launched] == ([0, 1] if name == "one" else [2, 3])


def test_every_choice_is_composed_before_the_first_trial():
    seen = []

    def composed(overrides):
        seen.append(overrides)
        return OmegaConf.create(CONFIG)

    check_space(composed, {"a": CategoricalDistribution(["p", "q"]), "b": FloatDistribution(0, 1)}, {"c": "3"})
    assert seen == [["a=p", "b=0.0", "c=3"], ["a=q", "b=0.0", "c=3"], ["a=p", "b=1.0", "c=3"]]


@pytest.mark.slow
def test_retried_trial_is_a_new_job_with_the_same_parameters(sweep, monkeypatch, capsys):
    from blockwright.lab.sweep.__main__ import ask_again
    from blockwright.lab.sweep.table import rows_of
    from blockwright.training.result import record_failure

    class Failing(Launcher):
        def run(self, number, given):
            record_failure(self.sweep / str(number), "no memory")
            return math.inf

    search(sweep, Failing(sweep), n_trials=2, n_jobs=1).sweep(SPACE)
    ask_again(sweep, plans.read(sweep), [1])
    ask_again(sweep, plans.read(sweep), [1])  # as it has been already
    assert [row["reason"] for row in rows_of(sweep)] == ["no memory", "no memory; retried as job 2"]
    monkeypatch.setenv(plans.RESUMED, str(sweep))
    again = Launcher(sweep)
    search(sweep, again, n_trials=plans.read(sweep)["n_trials"], n_jobs=1).sweep(SPACE)
    assert [number for number, _ in again.launched] == [2]
    first, second = trials_of(sweep)[1:]
    assert first[3] == second[3] and first[2] == math.inf and second[2] != math.inf


DIRECTIONS = {"maximize": "contradicts val/loss", "minimise": "Did you mean 'minimize'"}


def test_what_cannot_be_searched_is_refused(sweep, tmp_path, monkeypatch):
    for direction, says in {**DIRECTIONS, ("minimize", "maximize"): "says which way"}.items():
        with pytest.raises(ConfigError, match=says) as caught:
            search(sweep, Launcher(sweep), direction=direction).sweep(SPACE)
        assert caught.value.path == "hydra.sweeper.direction"
    spaces = {"x=1": "leaves nothing to search", "x=interval(0,1) name=glob(*)": "is not a search space"}
    for arguments, told in spaces.items():
        with pytest.raises(ConfigError, match=told):
            search(sweep, Launcher(sweep)).sweep(arguments.split())
    assert not (sweep / "study.db").exists()
    monkeypatch.setattr(Plugins.instance(), "instantiate_launcher", lambda **_: None)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}})
    for settings, told in (({"n_trials": 0}, "a search needs one"), ({"n_jobs": -1}, "counts trials at a time")):
        with pytest.raises(ConfigError, match=told):
            made = search(sweep, Launcher(sweep), **settings)
            made.setup(config=config, hydra_context=None, task_function=None)
    node = {**CONFIG, "callbacks": {"pruning": {"pruner": {"_target_": "optuna.pruners.MedianPrunner"}}}}
    with pytest.raises(ConfigError, match="Did you mean 'MedianPruner'"):
        check_space(lambda overrides: OmegaConf.create(node), {"b": FloatDistribution(0, 1)}, {})
    study = {"name": "s", "storage": "sqlite:////nowhere/at/all.db"}
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_study(tmp_path, {"direction": "minimize", "study": study})
    for sampler, lacking in ((optuna.samplers.CmaEsSampler, "cmaes"), (optuna.samplers.QMCSampler, "scipy")):
        monkeypatch.setattr("blockwright.registry.errors.has_package", lambda name, lacking=lacking: name != lacking)
        with pytest.raises(ConfigError, match=lacking):
            check_packages(sampler())
    monkeypatch.undo()
    check_packages(optuna.samplers.TPESampler())


def test_password_of_the_environment_is_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_DB", f"sqlite:///{tmp_path}/secret.db")
    study = {"name": "s", "storage": "${oc.env:SECRET_DB}"}
    open_study(tmp_path, {"direction": "minimize", "study": study})
    assert (tmp_path / "secret.db").exists() and "secret.db" not in json.dumps(study)


def test_jobs_that_do_not_follow_each_other_are_launched_apart():
    assert [[n for n, _ in group] for group in consecutive([(3, []), (4, []), (7, []), (9, [])])] == [[3, 4], [7], [9]]


WRITTEN = {
    "choice(a, b)": CategoricalDistribution(("a", "b")),
    "mla,gqa": CategoricalDistribution(("mla", "gqa")),
    "1,2.5,null,true": CategoricalDistribution((1, 2.5, "null", True)),
    "range(1, 9)": IntDistribution(1, 8),
    "range(0, 10, 3)": IntDistribution(0, 9, step=3),
    "range(0, 9, 3)": IntDistribution(0, 6, step=3),
    "range(0.0, 0.3, 0.1)": FloatDistribution(0.0, 0.2, step=0.1),
    "range(0, 1, 0.3)": FloatDistribution(0.0, 0.9, step=0.3),
    "interval(0, 1.5)": FloatDistribution(0, 1.5),
    "interval(2, 5)": FloatDistribution(2, 5),
    "int(interval(2, 5))": IntDistribution(2, 5),
    "tag(log, interval(1e-4, 1e-2))": FloatDistribution(1e-4, 1e-2, log=True),
    "tag(log, int(interval(1, 64)))": IntDistribution(1, 64, log=True),
}


def test_sweep_is_read_as_a_distribution_and_fixed_values_are_not_searched():
    for written, distribution in WRITTEN.items():
        assert read_space([f"x={written}"]) == ({"x": distribution}, {}), written
    assert read_space(["x=interval(0, 1)", "y=a,b", "x=0.5"]) == (
        {"y": CategoricalDistribution(("a", "b"))},
        {"x": "0.5"},
    )
    space, _ = read_space(["x=interval(0.0, 1.0)"])
    assert ends(space["x"]) == [0.0, 1.0]
    with pytest.raises(ConfigError, match="sampler=grid tries every one"):
        choices(space["x"])
    for written in (*NONE, "range(1, 5, 0)", "[1"):
        with pytest.raises(ConfigError, match="is not a search space"):
            read_space([f"x={written}"])


@pytest.mark.parametrize("written", [w for w in WRITTEN if w.startswith(("range", "choice", "mla"))])
def test_values_of_a_grid_are_those_of_hydras_own_sweep(written):
    (override,) = OverridesParser.create().parse_overrides([f"x={written}"])
    space, _ = read_space([f"x={written}"])
    assert [str(value) for value in choices(space["x"])] == pytest.approx(
        list(override.sweep_string_iterator()), abs=0
    ) or [float(value) for value in choices(space["x"])] == pytest.approx(
        [float(value) for value in override.sweep_string_iterator()]
    )


NONE = ("glob(*)", "interval(2, 1)", "interval(0, inf)", "interval(a, b)", "tag(log, interval(0, 1))", "range(5, 1)")
NONE += ("tag(lgo, interval(1, 2))", "tag(log, range(1, 9))", "shuffle(1, 2, 3)", "shuffle(range(1, 9))", "choice()")
