"""Controls: what a file says, that all of conf/control can run, and what is refused."""

import math
import random
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import yaml

from blockwright.lab.calibration import control
from blockwright.lab.calibration.control import Control, Summary, judge
from blockwright.lab.report import evidence
from blockwright.lab.statistics import intervals, looks, tuning, variance
from blockwright.registry import ConfigError, plugins
from blockwright.training.configuration.composing import compose_config

OURS = [file.stem for file in sorted(control.FILES.folder.glob("*.yaml"))]
MINIMAL = {"about": "a known effect", "expect": "worse", "arms": {"mine": ["model/position=none"]}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """The name of the only control there is, with these keys."""
    monkeypatch.setattr(control, "FILES", replace(control.FILES, folder=tmp_path))

    def make(**keys):
        settings = {k: v for k, v in {**MINIMAL, **keys}.items() if v is not ...}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return "mine"

    return make


def test_every_effect_has_a_least_size_and_some_pairs_are_equal():
    read = [control.read(name) for name in OURS]
    assert all(each.least > 0 for each in read if each.is_effect)
    assert min(each.least for each in read if each.is_effect) < 0.01  # as small as verdicts are given on
    assert sum(each.repeats for each in read if each.expect == "absent") >= 10
    assert {part for each in read for part in each.covers} == {"Holm's correction", "looks", "tuning"}


def test_runs_are_paired_by_seed_unless_each_arm_has_its_own(write):
    alike = control.read(write(base=["a=1"], baseline=["b=2"], seeds=[3, 5]))
    assert alike.missing({}) == [("a=1", arm, f"seed={s}") for arm in ("b=2", "model/position=none") for s in (3, 5)]
    apart = control.read(write(arms={"mine": []}, seeds=[3, 5], apart=True, repeats=2))
    seeds = [[[run.seed for run in arm.runs] for arm in sweep.arms] for sweep in apart.sweeps({})]
    assert seeds == [[[3, 5], [3, 5]]] * 2
    assert len(set(apart.missing({}))) == 8


@pytest.mark.parametrize("name", [OURS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in OURS[1::4])])
def test_arms_of_a_control_compose_and_differ_in_what_it_is_about_alone(name):
    of = control.read(name)
    baseline, *arms = (compose_config(arm.runs[0].overrides) for arm in of.sweeps({})[0].arms)
    for arm in arms:
        assert arm != baseline
        assert all(arm[part] == baseline[part] for part in ("scheduler", "task", "callbacks"))
        if of.expect in ("absent", "identical"):
            assert arm.trainer == baseline.trainer
        if of.apart:
            assert arm.model == baseline.model and arm.seed != baseline.seed
        else:
            assert arm.data == baseline.data


def test_a_plugin_adds_controls_and_may_not_take_a_name(tmp_path, monkeypatch, write):
    write()
    theirs = tmp_path / "theirs_of_a_test"
    theirs.mkdir()
    (theirs / "more.yaml").write_text(yaml.safe_dump(MINIMAL))
    point = EntryPoint("x", "theirs_of_a_test", control.ENTRY_POINTS)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == control.ENTRY_POINTS else [])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert control.FILES.names() == ["mine", "more"]
    assert isinstance(control.read("more"), Control)
    (theirs / "mine.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as refused:
        control.read("mine")
    assert refused.value.value == "mine"


REFUSED = [
    ({"expect": "different"}, "expect"),
    ({"expect": ...}, "expect"),
    ({"about": ...}, "about"),
    ({"arms": {}}, "arms"),
    ({"arms": {"baseline": []}}, "arms"),
    ({"looks": [2, 4]}, "looks"),
    ({"looks": [4, 2, 6]}, "looks"),
    ({"rates": [0.1, 0.2]}, "rates"),
    ({"least": -1.0}, "least"),
    ({"expect": "absent", "least": 0.1}, "least"),
    ({"seeds": [1]}, "seeds"),
    ({"seeds": [1, 1]}, "seeds"),
    ({"expect": "identical", "seeds": []}, "seeds"),
    ({"seeds": [1, -1]}, "seeds"),
    ({"repeats": 0}, "repeats"),
    ({"arms": {"one": {"a": 1}}}, "arms.one"),
]


def test_a_control_that_says_nothing_is_refused(write, tmp_path):
    for keys, path in REFUSED:
        with pytest.raises(ConfigError) as refused:
            control.read(write(**keys))
        assert refused.value.path == f"control.mine.{path}"
    for text in ("[1, 2", "- 1"):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError):
            control.read("mine")
    with pytest.raises(ConfigError):
        control.read("mime")
    with pytest.raises(ConfigError, match="blockwright calibrate --only no_norm"):
        compose_config(["control=no_norm"])


def judged(control, loss):
    """Of runs that are not trained.

    Args:
        control: the comparison
        loss: of an arm, by its name, and one of its runs
    """
    losses = {}
    while control.missing(losses):
        for sweep in control.sweeps(losses):
            losses |= {run.overrides: loss(arm.name, run) for arm in sweep.arms for run in arm.runs if run.is_pending}
    found = judge(control, losses)
    assert found is not None
    return found


def outcome(expect, differences, least=0.0, **keys):
    """Of runs that differ by so much, seed by seed."""
    control = Control("x", "about", expect, {"b": ("b=2",)}, least=least, seeds=tuple(range(len(differences))), **keys)
    return judged(control, lambda arm, run: 2.0 + 0.25 * run.seed + differences[run.seed] * (arm == "b"))


def test_outcomes_need_every_run_arm_and_repeat():
    control = Control("x", "about", "worse", {"b": ("b=2",)}, seeds=(0, 1))
    runs = control.missing({})
    assert len(runs) == 4 and judge(control, dict.fromkeys(runs[:-1], 2.0)) is None
    arms = {"b": ("b=2",), "c": ("c=2",)}
    both = Control("x", "about", "worse", arms, seeds=(0, 1, 2))
    assert judged(both, lambda arm, run: 2 + 0.1 * (arm == "b") + 0.01 * run.seed * (arm == "c")).wrong == 1
    again = Control("x", "about", "absent", {"b": ()}, seeds=(0, 1, 2), apart=True, repeats=3)

    def third(arm, run):  # is another
        seed = int(run.overrides[-1].removeprefix("seed="))
        return 2 + 0.001 * run.seed * (arm == "b") + (arm == "b") * (seed >= 200_000)

    found = judged(again, third)
    assert (found.repeats, found.wrong, found.seen) == (3, 1, "worse")


def test_an_arm_that_is_tuned_is_compared_at_its_own_best_rate():
    rates, best = (0.0125, 0.025, 0.05, 0.1, 0.2), {"baseline": 0.03, "b": 0.08}
    control = Control("x", "about", "absent", {"b": ("b=2",)}, seeds=(0, 1, 2), rates=rates)
    used = {"baseline": set(), "b": set()}

    def loss(arm, run):
        if run.stage == "compare":
            used[arm].add(run.lr)
        return 2 + 0.1 * math.log2(run.lr / best[arm]) ** 2 + 0.001 * run.seed * (arm == "b")

    assert not judged(control, loss).wrong
    assert {arm: pytest.approx(rate, rel=0.02) for arm, rate in best.items()} == {a: u.pop() for a, u in used.items()}


def test_every_part_of_a_verdict_is_gone_through(monkeypatch):
    parts = [
        (evidence, "weigh"), (variance, "between"), (intervals, "holm"), (looks, "nominal"), (tuning, "fit"),
    ]  # fmt: skip
    called = set()
    for module, name in parts:
        function = getattr(module, name)

        def heard(*args, _name=name, _function=function, **keys):
            called.add(_name)
            return _function(*args, **keys)

        monkeypatch.setattr(module, name, heard)
    monkeypatch.setattr("blockwright.lab.report.findings.weigh", evidence.weigh)
    evidence.planned.cache_clear()
    for name in control.FILES.names():
        judged(control.read(name), lambda arm, run: 2 + 0.01 * random.Random(str(run.overrides)).gauss(0, 1))
    assert called == {name for _, name in parts}


def summary(found, false, identical=True, effects=8, absent=4):
    outcomes = [outcome("worse", THERE if i < found else GONE) for i in range(effects)]
    outcomes += [outcome("absent", THERE if i < false else GONE) for i in range(absent)]
    return Summary([*outcomes, outcome("identical", [0.0, 0.0] if identical else [1e-6, 0.0])])


THERE, GONE = [0.30, 0.31, 0.29], [0.01, -0.02, 0.005]
SEEN = [  # differences, seed by seed, and their least size → what is seen, and whether it is as known
    ("worse", THERE, 0.2, "worse", True),
    ("worse", THERE, 0.4, "worse", False),  # there, but nearly gone
    ("better", THERE, 0.2, "worse", False),  # the other way
    ("better", [-0.30, -0.31, -0.29], 0.2, "better", True),
    ("worse", [0.9, -0.2, 0.1], 0.2, "undecided", False),
    ("worse", [0.0, 0.0, 0.0], 0.2, "identical", False),
    ("better", [-0.3, -0.3, math.inf], 0.2, "none", False),
    ("absent", GONE, 0.0, "undecided", True),
    ("absent", [0.10, 0.11, 0.09], 0.0, "worse", False),
    ("absent", [0.0, 0.0, 0.0], 0.0, "identical", True),
    ("absent", [math.inf, math.nan, math.inf], 0.0, "none", False),
    ("identical", [0.0, 0.0], 0.0, "identical", True),
    ("identical", [0.0, 1e-7], 0.0, "undecided", False),
]


@pytest.mark.parametrize(("expect", "differences", "least", "seen", "known"), SEEN)
def test_what_is_seen(expect, differences, least, seen, known):
    found = outcome(expect, differences, least)
    assert (found.seen, not found.wrong) == (seen, known)


def test_when_an_instrument_passes():
    for given, passes in [
        (summary(8, 0), True),
        (summary(8, 1), True),  # one in twenty is chance
        (summary(8, 2), False),
        (summary(8, 2, absent=14), True),
        (summary(8, 3, absent=14), False),
        (summary(7, 0), False),
        (summary(8, 0, identical=False), False),  # never chance
        (Summary([]), False),
    ]:
        assert given.passes is passes and given.counts in given.sentence
        assert given.sentence.startswith("Calibrated") is passes
    assert "0.3 nats" in summary(8, 0).sentence
