"""What comes from the environment is used, and written down nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from jsonargparse import Namespace
from omegaconf import OmegaConf

from blockwright.registry import ConfigError
from blockwright.training.configuration import config_tree
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.placeholders import filled
from blockwright.training.configuration.secrets import hidden, read_from_environment
from blockwright.training.entry import cli
from blockwright.training.entry.execute import execute
from blockwright.training.entry.preflight import preflight


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cr3t-value")
    monkeypatch.setenv("SHORT", "8")


def test_values_are_found_through_other_values_and_nothing_else_is() -> None:
    cfg = OmegaConf.create(
        {
            "a": "${oc.env:SOME_KEY}",
            "b": "x-${a}",
            "c": "${oc.env:SHORT}",
            "d": "${oc.env:NONE_SUCH,free}",
            "e": "other",
        }
    )
    taken = read_from_environment(cfg)
    assert taken == {"s3cr3t-value": "${oc.env:SOME_KEY}"}
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert plain["a"] == "s3cr3t-value"  # type: ignore[index, call-overload]
    shown = hidden(plain, taken)
    assert shown == {"a": "${oc.env:SOME_KEY}", "b": "x-${oc.env:SOME_KEY}", "c": "8", "d": "free", "e": "other"}


def test_composition_takes_none(small: list[str]) -> None:
    with pytest.raises(ConfigError, match="written to every checkpoint") as caught:
        preflight(compose_config([*small, "+model.variants.ffn.x.name=${oc.env:SOME_KEY}"], output_dir="x"))
    assert caught.value.path == "model.variants.ffn.x.name" and "s3cr3t" not in str(caught.value)


def test_no_file_of_a_run_holds_it(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ["trainer.max_steps=1", "callbacks=[interruption,report]", "tags=['${oc.env:SOME_KEY}']"]
    made += [f"data.cache_dir={tmp_path}/${{oc.env:SOME_KEY}}", "logger.csv.name=${oc.env:SOME_KEY}"]
    folder = tmp_path / "run"
    folder.mkdir()
    run = preflight(compose_config([*small, *made], output_dir=str(folder)))
    assert run.logger["csv"]["name"] == "s3cr3t-value" and "s3cr3t" not in repr(run.shown)
    cli.export(run.shown, folder)
    config_tree.show(run.shown, folder, print_config=False)
    execute(replace(run, logger={"csv": {**run.logger["csv"], "name": ""}}))  # the folder that it names would be found
    assert len(list(folder.rglob("*.ckpt"))) == 1 and list(folder.rglob("hparams.yaml"))
    holding = [f for f in folder.rglob("*") if f.is_file() and b"s3cr3t-value" in f.read_bytes()]
    assert not holding


def test_exported_configuration_fetches_it_again() -> None:
    trainer = Namespace(
        default_root_dir="${run_dir}", logger=[{"key": "${oc.env:SOME_KEY}"}], other="${oc.env:NONE_SUCH}"
    )
    found = filled(Namespace(trainer=trainer), "here").trainer
    assert found.logger == [{"key": "s3cr3t-value"}] and found.other == "${oc.env:NONE_SUCH}"
