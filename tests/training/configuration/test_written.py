"""What is kept of a configuration: whole, its run's folder left open, and without what the environment gave."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from omegaconf import OmegaConf

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.record import Change
from blockwright.training.configuration import placeholders
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.placeholders import filled, hidden, read_from_environment
from blockwright.training.entry import cli
from blockwright.training.entry.execute import execute
from blockwright.training.entry.hydra_job import MOST, PARTS, show
from blockwright.training.entry.preflight import preflight


def test_tree_holds_each_setting_once_and_others_after_the_parts(tmp_path: Path, capsys: Any) -> None:
    plain: dict[str, Any] = {"seed": 3, "mine": {"deep": {"er": 2}}, **{name: {"x": 1} for name in PARTS}}
    plain["callbacks"] = {}
    show(plain, tmp_path, print_config=False)
    saved = (tmp_path / "config_tree.log").read_text()
    assert re.findall(r"^[├└]── (\w+)", saved, re.M) == [*PARTS, "seed", "mine"]
    assert "── callbacks: {}" in saved and "── er: 2" in saved and saved.count("── x: 1") == len(PARTS) - 1
    assert capsys.readouterr().out == f"Configuration: {tmp_path / 'config_tree.log'}\n"
    show(plain, tmp_path, print_config=False, differing=[Change("a.b", i, i + 1) for i in range(MOST + 2)])
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith(f"in {MOST + 2}:") and header.split() == ["setting", "default", "here"]
    assert rows[1].split() == ["a.b", "1", "2"] and rows[MOST:] == ["  … and 2 more"]
    show(plain, tmp_path, print_config=True)
    printed = capsys.readouterr().out
    assert "── er: 2" in printed and "Configuration:" not in printed


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/a/run", "${run_dir}"),
        ("/a/run/checkpoints", "${run_dir}/checkpoints"),
        ("file:/a/run/mlruns", "file:${run_dir}/mlruns"),
        ("/a/run2/x", "/a/run2/x"),
        ("/b/a/run/x", "/b/a/run/x"),
        ("/a/runs", "/a/runs"),
    ],
)
def test_only_the_folder_and_what_lies_in_it_is_left_open(text: str, kept: str) -> None:
    assert placeholders.portable({"x": [{"y": text}, 3]}, "/a/run") == {"x": [{"y": kept}, 3]}


def test_no_part_of_a_configuration_names_the_folder_of_its_run(checked: Callable[..., dict[str, Any]]) -> None:
    plain = checked("callbacks=[default,pruning]", "logger=default")
    text = yaml.safe_dump(cli.to_cli(plain))
    assert plain["paths"]["output_dir"] not in text and text.count("${run_dir}") == 7


def settings(**parts: Any) -> Namespace:
    trainer = Namespace(default_root_dir=parts.pop("root", None), callbacks=[Namespace(**parts)], logger=False)
    return Namespace(trainer=trainer, seed_everything=0)


def test_folder_and_secrets_are_filled_in_at_every_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "hush-hush")
    given = settings(dirpath="${run_dir}/checkpoints", key="x-${oc.env:A_KEY}", other="${oc.env:NOT_THERE}")
    filled = placeholders.filled(given, "new")
    assert vars(filled.trainer.callbacks[0]) == {
        "dirpath": "new/checkpoints",
        "key": "x-hush-hush",
        "other": "${oc.env:NOT_THERE}",
    }
    assert filled.trainer.default_root_dir == "new"
    assert given.trainer.callbacks[0].dirpath == "${run_dir}/checkpoints"


def test_file_that_names_the_folder_of_a_finished_run_is_led_to_the_new_one(tmp_path: Path) -> None:
    given = settings(root=str(tmp_path), dirpath=f"{tmp_path}/checkpoints")
    assert placeholders.filled(given, "new").trainer.default_root_dir == str(tmp_path)  # a folder without a run
    (tmp_path / "lightning_cli.yaml").touch()
    filled = placeholders.filled(given, "new")
    assert (filled.trainer.default_root_dir, filled.trainer.callbacks[0].dirpath) == ("new", "new/checkpoints")


def test_folder_of_a_run_is_new_and_the_same_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "fit"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    first, second = (placeholders.choose(f"{tmp_path}/${{now}}") for _ in range(2))
    assert first != second and "$" not in first
    assert sys.argv == ["train.py", "fit", f"--run_dir={first}", f"--run_dir={second}"]
    assert placeholders.choose(str(tmp_path)) == str(tmp_path)  # there, but empty
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError) as caught:
        placeholders.choose(str(tmp_path))
    assert caught.value.path == "run_dir"
    assert placeholders.choose(str(tmp_path), f"{tmp_path}/checkpoints/last.ckpt") == str(tmp_path)  # its own run's
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert placeholders.choose(str(tmp_path)) == str(tmp_path)  # the first process has chosen it


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(checkpoint_callback=SimpleNamespace(dirpath=str(tmp_path)))
    placeholders.refuse_to_overwrite(trainer, None)
    (tmp_path / "last.ckpt").touch()
    placeholders.refuse_to_overwrite(trainer, str(tmp_path / "last.ckpt"))
    for other in (None, "elsewhere/last.ckpt"):
        with pytest.raises(ConfigError, match="another run"):
            placeholders.refuse_to_overwrite(trainer, other)
    placeholders.refuse_to_overwrite(SimpleNamespace(checkpoint_callback=None), None)  # type: ignore[arg-type]


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
    show(run.shown, folder, print_config=False)
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
