"""What a kept configuration leaves open, and how it is filled in: never with the folder of the run that wrote it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from blockwright.registry import ConfigError
from blockwright.training.configuration import placeholders
from blockwright.training.entry import cli


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
