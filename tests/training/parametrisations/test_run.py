"""A run with a parametrisation: its option, its record, its parts and its refusals."""

from __future__ import annotations

import pytest

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.record import Past, changes, is_same_run, record
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import Run
from blockwright.training.entry.cli import to_cli
from blockwright.training.entry.parse import parse_settings
from blockwright.training.entry.preflight import check
from blockwright.training.entry.start import recipe_of
from blockwright.training.starts import Lora

SMALL = ["data=sorting", "model.n_layers=2", "model.d_model=32", "logger.tensorboard=null"]
WIDTH = ["parametrisation=width", "parametrisation.base={d_model: 16}"]


def run_of(*overrides: str) -> Run:
    return parse_settings(compose_config([*SMALL, "paths.log_dir=logs", *overrides], output_dir="logs/run"))


@pytest.fixture(scope="module")
def plain() -> Run:
    return run_of()


@pytest.fixture(scope="module")
def scaled() -> Run:
    return run_of(*WIDTH)


def test_default_scales_nothing_and_a_task_has_the_factors_for_its_decoder_and_its_optimizer(
    plain: Run, scaled: Run
) -> None:
    assert plain.parametrisation == {"name": "standard"} and not recipe_of(plain).scales
    scales = parts.build("task", scaled).configured.recipe.scales
    assert scales["layers.1.ffn.experts.down"].rate != 1 and scales["head.weight"].init == 0.5
    assert to_cli(scaled)["model"]["parametrisation"] == {"name": "width", "base": {"d_model": 16}}


def test_records_of_standard_runs_are_those_of_versions_without_another(plain: Run, scaled: Run) -> None:
    ours = record(scaled)
    assert "parametrisation" not in record(plain)
    assert ours["parametrisation"] == {"name": "width", "base": {"d_model": 16}}
    past = Past(record(plain), complete=True, step=1, rate=None)
    assert [change.path for change in changes(past, ours)] == ["parametrisation"]
    assert not is_same_run(past, ours) and is_same_run(past, record(plain))


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["parametrisation=widht"], "parametrisation"),
        (["parametrisation=width"], "parametrisation.base"),
        ([*WIDTH, "parametrisation.bas=1"], "parametrisation.bas"),
        (["parametrisation=width", "parametrisation.base={d_model: 15}"], "parametrisation.base.attention.n_heads"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(overrides: list[str], path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run = run_of(*overrides)
        recipe_of(run)
        check(run)
    assert refused.value.path.startswith(path)
    assert refused.value.remedy


def test_adapters_which_no_base_has_are_refused(scaled: Run) -> None:
    decoder = compose(scaled.model, device="meta")
    Lora(targets=["attention"]).attach(decoder)
    with pytest.raises(ConfigError) as refused:
        recipe_of(scaled).build(decoder)
    assert refused.value.path == "parametrisation"
