"""A run with a parametrisation: its option, its record, its parts and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.changes import changes, is_same_run
from blockwright.training.checkpoints.record import Past, record
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import Run
from blockwright.training.entry.cli import to_cli
from blockwright.training.entry.parse import parse_settings
from blockwright.training.entry.preflight import check
from blockwright.training.entry.start import recipe_of
from blockwright.training.starts.adapter import Lora

SMALL = ["data=sorting", "model.n_layers=2", "model.d_model=32", "logger.tensorboard=null"]
WIDTH = ["parametrisation=width", "parametrisation.base={d_model: 16}"]


def run_of(tmp_path: Path, *overrides: str) -> Run:
    return parse_settings(compose_config([*SMALL, f"paths.log_dir={tmp_path}", *overrides], output_dir=str(tmp_path)))


def test_the_default_is_standard_and_scales_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert run.parametrisation == {"name": "standard"}
    assert not recipe_of(run).scales


def test_a_task_has_the_factors_for_its_decoder_and_its_optimizer(tmp_path: Path) -> None:
    setup = parts.build("task", run_of(tmp_path, *WIDTH)).configured
    assert setup.recipe.scales["layers.1.ffn.experts.down"].rate != 1
    assert setup.recipe.scales["head.weight"].init == 0.5


def test_records_of_standard_runs_are_those_of_versions_without_another(tmp_path: Path) -> None:
    plain, scaled = record(run_of(tmp_path)), record(run_of(tmp_path, *WIDTH))
    assert "parametrisation" not in plain
    assert scaled["parametrisation"] == {"name": "width", "base": {"d_model": 16}}
    past = Past(plain, complete=True, step=1, rate=None)
    assert [change.path for change in changes(past, scaled)] == ["parametrisation"]
    assert not is_same_run(past, scaled)
    assert is_same_run(past, plain)


def test_lightning_cli_has_the_same_setting(tmp_path: Path) -> None:
    assert to_cli(run_of(tmp_path, *WIDTH))["model"]["parametrisation"] == {"name": "width", "base": {"d_model": 16}}


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["parametrisation=widht"], "parametrisation"),
        (["parametrisation=width"], "parametrisation.base"),
        ([*WIDTH, "parametrisation.bas=1"], "parametrisation.bas"),
        (["parametrisation=width", "parametrisation.base={d_model: 15}"], "parametrisation.base.attention.n_heads"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(tmp_path: Path, overrides: list[str], path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run = run_of(tmp_path, *overrides)
        recipe_of(run)
        check(run)
    assert refused.value.path.startswith(path)
    assert refused.value.remedy


def test_adapters_which_no_base_has_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, *WIDTH)
    decoder = compose(run.model, device="meta")
    Lora(targets=["attention"]).attach(decoder)
    with pytest.raises(ConfigError) as refused:
        recipe_of(run).build(decoder)
    assert refused.value.path == "parametrisation"
