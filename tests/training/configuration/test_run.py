"""The settings at the root of a configuration: types, ranges, and what is said of each that is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf, open_dict

from blockwright import registry
from blockwright.registry import ConfigError
from blockwright.registry.ranges import Seed
from blockwright.registry.reading import checked
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import FOLDER, HINTS, OLDER, Run
from blockwright.training.entry.preflight import preflight
from blockwright.training.jobs import SWEEP

Checked = Callable[..., Any]


def test_seed_is_one_that_every_generator_takes() -> None:
    for seed in (5_000_000_000, 2**32, -1, "abc", 1.0, True, None):
        with pytest.raises(ConfigError) as caught:
            checked(seed, Seed, "seeds")
        assert (caught.value.path, caught.value.value, caught.value.remedy) == ("seeds", seed, "Write seeds=0")
    checked(0, Seed, "seeds")
    checked(2**32 - 1, Seed, "seeds")


# What is set, or taken away (~): path → remedy, where the path alone does not say it.
REFUSED = {
    "train=maybe": "Write train=true or train=false",
    "auto_resume=1": "Write auto_resume=true or auto_resume=false",
    "trainer.compile=2": "Write trainer.compile=auto",
    "task_name=''": "Write a word: task_name=mine",
    "task_name=../../elsewhere": "Write a word: task_name=mine",
    "task_name=null": "Write the name of the runs' folder: task_name=mine",
    "tags=abc": "Write tags=[mine]",
    "tags=[[a]]": "Write tags=[mine]",
    "seed=-1": "Write seed=0",
    "init_from=7": "Name a run's folder, or the OUT of blockwright import: init_from=OUT",
    "resume.changed=hide": "Write resume.changed=show or resume.changed=allow",
    "optimized_metric=null": "Name the figure by which runs are compared: optimized_metric=val/loss",
    "extras.colour=true": "Known: enforce_tags, ignore_warnings, print_config",
    "mine=1": None,
    "extras=null": None,
    "paths.log_dir=null": "Correct it, or leave out paths.log_dir for the default",
    "~paths.log_dir": None,
    "paths.output_dir=7": None,
    "callbacks.checkpoint=5": "Correct it, or leave out callbacks.checkpoint for the default",
    "logger.mine=csv": "Correct it, or leave out logger.mine for the default",
    "trainer.callbacks=[]": "Leave it out, and write callbacks=NAME",
    "~optimizer._target_": None,
    "extras.enforce_tags=true": None,
}


@pytest.fixture(scope="module")
def composed(small: list[str]) -> Any:
    return compose_config([*small, "tags=[]"], output_dir="x")


@pytest.mark.parametrize("override", REFUSED)
def test_setting_at_the_root_is_what_it_has_to_be(composed: Any, override: str) -> None:
    path, _, value = override.strip("~").partition("=")
    with open_dict(cfg := copy.deepcopy(composed)):
        if override.startswith("~"):
            parent, _, key = path.rpartition(".")
            del OmegaConf.select(cfg, parent)[key]
        else:
            OmegaConf.update(cfg, path, yaml.safe_load(value), merge=False, force_add=True)
    with pytest.raises(ConfigError) as caught:
        preflight(cfg)
    assert caught.value.path == ("tags" if "tags" in override else path), str(caught.value)
    assert REFUSED[override] is None or caught.value.remedy == REFUSED[override]


def test_run_is_a_mapping_of_its_settings_and_knows_its_folders(checked: Any, tmp_path: Path) -> None:
    run = checked("callbacks.checkpoint.dirpath=null")
    assert len(run) == len([*run]) == len(dict(run)) and {*HINTS, "init_from"} <= {*run}
    assert (run["seed"], run["adapter"]) == (run.seed, run.starts["adapter"])
    assert run.folder == tmp_path / "run" and run.checkpoints == tmp_path / "run" / FOLDER
    assert run.owns(run.checkpoints / "last.ckpt") and not run.owns(tmp_path / "run" / "last.ckpt")
    kept = replace(run, callbacks={"checkpoint": {"dirpath": str(tmp_path / "kept")}})
    assert kept.checkpoints == tmp_path / "kept" and kept.owns(tmp_path / "kept" / "x.ckpt")
    without = replace(run, callbacks={"checkpoint": None})
    assert without.keeper == {} and without.checkpoints == run.checkpoints
    assert not run.in_sweep
    (tmp_path / SWEEP).touch()
    assert run.in_sweep


def test_tag_may_be_a_number_extras_may_be_some_and_paths_may_be_ones_own(checked: Checked) -> None:
    plain = checked("tags=[2026,a]", "extras.enforce_tags=true", "~extras.ignore_warnings", "+paths.scratch=/x")
    assert plain["tags"] == [2026, "a"] and plain["extras"]["ignore_warnings"] is False
    assert plain["paths"]["scratch"] == "/x"


def test_configuration_of_an_older_version_gets_the_settings_that_it_has_not(checked: Checked) -> None:
    registered = [name for name in registry.settings() if name != "init_from"]
    older = {key: value for key, value in checked().items() if key not in (*OLDER, *registered)}
    run = Run.of(older, {})
    assert {key: run[key] for key in OLDER} == OLDER and set(run) == {*HINTS, *registered}
    assert run.starts == dict.fromkeys(registered)
