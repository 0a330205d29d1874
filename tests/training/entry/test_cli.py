"""How a composed configuration becomes Lightning CLI's; the doors themselves are tried in tests/test_train.py."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from blockwright.registry import ConfigError
from blockwright.training.configuration.instantiate import to_class_paths, to_targets
from blockwright.training.configuration.run import OWN
from blockwright.training.entry import cli


def test_target_becomes_class_path_at_every_depth_and_back() -> None:
    inner = {"_target_": "c.D", "y": [{"_target_": "e.F"}, 2]}
    node = {"_target_": "a.B", "_convert_": "all", "x": 1, "inner": inner, "plain": {"name": "mla", "list": [1]}}
    made_inner = {"class_path": "c.D", "init_args": {"y": [{"class_path": "e.F", "init_args": {}}, 2]}}
    made = to_class_paths(node)
    assert made["class_path"] == "a.B"
    assert made["init_args"] == {"x": 1, "inner": made_inner, "plain": {"name": "mla", "list": [1]}}
    assert to_targets(made) == {key: value for key, value in node.items() if key != "_convert_"}
    assert to_targets({"class_path": "a.B", "init_args": {"x": 1}, "y": 2}) == {"_target_": "a.B", "x": 1, "y": 2}


def test_every_part_of_the_composition_has_its_place(checked: Callable[..., Any], tmp_path: Path) -> None:
    plain = checked("seed=7", "callbacks.progress=null", "ckpt_path=null")
    made = cli.to_cli(plain)
    assert made["seed_everything"] == 7 and made["ckpt_path"] is None and made["weights_only"] is True
    assert {k: v for k, v in made["trainer"].items() if k not in ("callbacks", "logger", "plugins")} == {
        **{k: v for k, v in plain["trainer"].items() if k not in ("_target_", "plugins", *OWN)},
        "default_root_dir": "${run_dir}",
    }
    names = [callback["class_path"].rpartition(".")[2] for callback in made["trainer"]["callbacks"]]
    assert {"Machine", "Keeper", "Interruption", "Guard", "RunReport"} <= {*names} and "Progress" not in names
    loggers = [logger["class_path"].rpartition(".")[2] for logger in made["trainer"]["logger"]]
    assert loggers == ["CSVLogger", "TensorBoardLogger"]
    run = made["model"]
    assert run["model"] == plain["model"] and run["seed"] == 7 and run["task"] == plain["task"]
    assert run["optimizer"]["init_args"]["lr"] == plain["optimizer"]["lr"]
    assert made["data"]["data"]["corpus"]["class_path"] == "blockwright.training.data.corpus.TextFiles"
    path = cli.export(plain, tmp_path)
    assert path == tmp_path / "lightning_cli.yaml" and yaml.safe_load(path.read_text()) == made
    assert cli.to_cli(replace(plain, logger={}))["trainer"]["logger"] is False  # and not Lightning's default


PUT_FIRST = {
    "fit": "fit --compose",
    "fit --trainer.max_steps=3": "fit --compose --trainer.max_steps=3",
    "validate --ckpt_path x": "validate --compose --ckpt_path x",
    "fit --config {tmp}/whole.yaml": "fit --config {tmp}/whole.yaml",
    "fit --config={tmp}/part.yaml": "fit --compose --config={tmp}/part.yaml",
    "fit --config {tmp}/none.yaml": "fit --config {tmp}/none.yaml",
    "fit --compose seed=1": "fit --compose seed=1",
    "fit -c {tmp}/part.yaml --compose seed=1 test=false --print_config --compose a=2": (
        "fit --compose seed=1 test=false a=2 -c {tmp}/part.yaml --print_config"
    ),
    "fit --help": "fit --help",
}
WHOLE = {"model": {"task": {}, "model": {}, "optimizer": {}, "scheduler": {}}, "data": {"data": {}}}


def test_composition_comes_first_and_is_the_default_where_none_is_given(monkeypatch: Any, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    (tmp_path / "part.yaml").write_text("trainer: {max_steps: 3}")
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(WHOLE))
    monkeypatch.setattr(cli, "ComposedCLI", lambda *args, **kwargs: seen.append(sys.argv[1:]))
    for given, wanted in PUT_FIRST.items():
        monkeypatch.setattr(sys, "argv", ["train.py"])
        cli.main(given.replace("{tmp}", str(tmp_path)).split())
        assert seen.pop() == wanted.replace("{tmp}", str(tmp_path)).split()


def test_what_would_be_dropped_is_refused(tmp_path: Path) -> None:
    """An override of what a file replaces, and a value inside the composition."""
    files: list[tuple[Any, str]] = [
        ({"model": {"model": {"n_layers": 1}}}, "model/attention=gqa"),
        ({"model": {"optimizer": {}}, "trainer": {"max_steps": 3}}, "optimizer.lr=1"),
        (WHOLE, "seed=1"),
    ]
    for file, override in files:
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(file))
        with pytest.raises(ConfigError) as refused:
            cli.main(["fit", "--config", f"{tmp_path}/x.yaml", "--compose", override])
        assert (refused.value.path, refused.value.value) == ("--compose", override)
    for option, remedy in (
        ("--model.optimizer.lr=0.01", "--compose optimizer.lr=0.01"),
        ("--model.optimizer.init_args.lr=-3", "--compose optimizer.lr=-3"),
        ("--data.data.batch_size=4", "--compose data.batch_size=4"),
        ("--model.task.frozen=[a]", "--compose task.frozen=[a]"),
    ):
        with pytest.raises(ConfigError) as refused:
            cli.main(["fit", "--compose", "model.n_layers=1", option])
        assert refused.value.path == option.partition("=")[0] and remedy in refused.value.remedy


def numbers_of_the_trainer() -> dict[str, Any]:
    """Every option of Lightning's trainer that takes a number → one that it takes, whole where it may be."""
    hints = {name: typing.get_args(hint) or (hint,) for name, hint in typing.get_type_hints(L.Trainer.__init__).items()}
    return {name: 1 if int in types else 0.5 for name, types in hints.items() if {int, float} & {*types}}


def printed(run: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The trainer's settings that --print_config prints."""
    with pytest.raises(SystemExit) as ended:
        run()
    out = capsys.readouterr().out
    assert not ended.value.code, out
    return yaml.safe_load(out)["trainer"]


@pytest.mark.slow
@pytest.mark.parametrize("in_file", [False, True], ids=["line", "file"])
def test_every_number_of_the_trainer_is_what_lightnings_own_command_line_makes_of_it(
    in_file: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = numbers_of_the_trainer()
    assert len(numbers) > 15 and numbers["limit_val_batches"] == 1
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"trainer": numbers}))
    options = [f"--trainer.{name}={value}" for name, value in numbers.items()]
    words = ["fit", *([f"--config={tmp_path}/x.yaml"] if in_file else options), "--print_config"]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    plain = printed(lambda: LightningCLI(L.LightningModule, auto_configure_optimizers=False, args=words), capsys)
    for clear in typing._cleanups:  # type: ignore[attr-defined] # its cache may hold what was imported before
        clear()
    assert typing.get_args(typing.Optional[float | int | None])[0] is float  # noqa: UP045
    ours = printed(lambda: cli.main(words), capsys)
    assert {name: ours[name] for name in numbers} == {name: plain[name] for name in numbers}
    assert all(type(ours[name]) is int for name in numbers if name.startswith("limit_"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--config", "nope.yaml"], "--config"),
        (["--config=whole.yaml", "--trainer.max_steps=abc"], "--trainer.max_steps"),
    ],
)
def test_argument_that_is_not_taken_is_one_message_and_no_usage(
    words: list[str], path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("whole.yaml").write_text(yaml.safe_dump(WHOLE))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ConfigError) as caught:
        cli.main(["fit", *words])
    assert (caught.value.path, caught.value.value) == (path, words[-1].rpartition("=")[2])
    assert "fit --help" in caught.value.remedy and capsys.readouterr().err == ""


def test_yes_in_a_file_is_no_number_of_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """True is 1 to Python."""
    (tmp_path / "x.yaml").write_text("trainer: {limit_val_batches: true}\n")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ConfigError) as caught:
        cli.main(["fit", f"--config={tmp_path}/x.yaml", "--print_config"])
    assert caught.value.path == "--trainer.limit_val_batches"
