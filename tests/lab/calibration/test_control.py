"""Controls: what a file says, that all of conf/control can run, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockwright.lab.calibration import control
from blockwright.lab.calibration.control import Control
from blockwright.registry import ConfigError, plugins
from blockwright.training.configuration.composing import compose_config

OURS = [file.stem for file in sorted(control.FILES.folder.glob("*.yaml"))]
MINIMAL = {"about": "a known effect", "expect": "worse", "arms": {"mine": ["model/position=none"]}}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The name of the only control there is, with these keys."""
    monkeypatch.setattr(control, "FILES", replace(control.FILES, folder=tmp_path))

    def make(**keys: Any) -> str:
        settings = {k: v for k, v in {**MINIMAL, **keys}.items() if v is not ...}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return "mine"

    return make


def test_every_effect_has_a_least_size_and_some_pairs_are_equal() -> None:
    read = [control.read(name) for name in OURS]
    assert all(each.least > 0 for each in read if each.is_effect)
    assert min(each.least for each in read if each.is_effect) < 0.01  # as small as verdicts are given on
    assert sum(each.repeats for each in read if each.expect == "absent") >= 10
    assert {part for each in read for part in each.covers} == {"Holm's correction", "looks", "tuning"}


@pytest.mark.parametrize("name", [OURS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in OURS[1::2])])
def test_arms_of_a_control_compose_and_differ_in_what_it_is_about_alone(name: str) -> None:
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


def test_runs_are_paired_by_seed_unless_each_arm_has_its_own(write: Callable[..., str]) -> None:
    alike = control.read(write(base=["a=1"], baseline=["b=2"], seeds=[3, 5]))
    assert alike.missing({}) == [("a=1", arm, f"seed={s}") for arm in ("b=2", "model/position=none") for s in (3, 5)]
    apart = control.read(write(arms={"mine": []}, seeds=[3, 5], apart=True, repeats=2))
    seeds = [[[run.seed for run in arm.runs] for arm in sweep.arms] for sweep in apart.sweeps({})]
    assert seeds == [[[3, 5], [3, 5]]] * 2
    assert len(set(apart.missing({}))) == 8


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"expect": "different"}, "control.mine.expect"),
        ({"expect": ...}, "control.mine.expect"),
        ({"about": ...}, "control.mine.about"),
        ({"arms": {}}, "control.mine.arms"),
        ({"arms": {"baseline": []}}, "control.mine.arms"),
        ({"looks": [2, 4]}, "control.mine.looks"),
        ({"looks": [4, 2, 6]}, "control.mine.looks"),
        ({"rates": [0.1, 0.2]}, "control.mine.rates"),
        ({"least": -1.0}, "control.mine.least"),
        ({"expect": "absent", "least": 0.1}, "control.mine.least"),
        ({"seeds": [1]}, "control.mine.seeds"),
        ({"seeds": [1, 1]}, "control.mine.seeds"),
        ({"expect": "identical", "seeds": []}, "control.mine.seeds"),
        ({"seeds": [1, -1]}, "control.mine.seeds"),
        ({"repeats": 0}, "control.mine.repeats"),
        ({"arms": {"one": {"a": 1}}}, "control.mine.arms.one"),
    ],
)
def test_a_control_that_says_nothing_is_refused(write: Callable[..., str], keys: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        control.read(write(**keys))
    assert refused.value.path == path


def test_a_file_that_is_no_mapping_and_a_name_that_is_none_are_refused(
    tmp_path: Path, write: Callable[..., str]
) -> None:
    write()
    (tmp_path / "mine.yaml").write_text("[1, 2")
    with pytest.raises(ConfigError):
        control.read("mine")
    (tmp_path / "mine.yaml").write_text("- 1")
    with pytest.raises(ConfigError):
        control.read("mine")
    with pytest.raises(ConfigError) as refused:
        control.read("mime")
    assert "mine" in refused.value.remedy


def test_a_plugin_adds_controls_and_may_not_take_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., str]
) -> None:
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


def test_a_run_that_chooses_a_control_is_refused_with_the_command() -> None:
    with pytest.raises(ConfigError, match=r"blockwright calibrate --only no_norm"):
        compose_config(["control=no_norm"])
