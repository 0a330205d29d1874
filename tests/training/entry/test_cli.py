"""How a composed configuration becomes Lightning CLI's; the doors themselves are tried in tests/test_train.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockwright.registry import ConfigError
from blockwright.training.configuration.class_paths import to_class_paths, to_targets
from blockwright.training.configuration.run import OWN
from blockwright.training.entry import cli


def test_target_becomes_class_path_at_every_depth() -> None:
    node = {
        "_target_": "a.B",
        "_convert_": "all",
        "x": 1,
        "inner": {"_target_": "c.D", "y": [{"_target_": "e.F"}, 2]},
        "plain": {"name": "mla", "list": [1]},
    }
    inner = {"class_path": "c.D", "init_args": {"y": [{"class_path": "e.F", "init_args": {}}, 2]}}
    arguments = {"x": 1, "inner": inner, "plain": {"name": "mla", "list": [1]}}
    made = to_class_paths(node)
    assert made == {"class_path": "a.B", "init_args": arguments}
    assert to_targets(made) == {key: value for key, value in node.items() if key != "_convert_"}


def test_every_part_of_the_composition_has_its_place(checked: Callable[..., dict[str, Any]]) -> None:
    plain = checked("seed=7", "callbacks.progress=null", "ckpt_path=null")
    made = cli.to_cli(plain)
    assert made["seed_everything"] == 7 and made["ckpt_path"] is None and made["weights_only"] is True
    assert {k: v for k, v in made["trainer"].items() if k not in ("callbacks", "logger", "plugins")} == {
        **{k: v for k, v in plain["trainer"].items() if k not in ("_target_", "plugins", *OWN)},
        "default_root_dir": "${run_dir}",
    }
    names = [callback["class_path"].rpartition(".")[2] for callback in made["trainer"]["callbacks"]]
    assert set(names) == {
        *("Machine", "Keeper", "Interruption", "Guard", "DeadExperts", "Throughput", "Completions", "RunReport")
    }
    assert [logger["class_path"].rpartition(".")[2] for logger in made["trainer"]["logger"]] == [
        "CSVLogger",
        "TensorBoardLogger",
    ]
    run = made["model"]
    assert run["model"] == plain["model"] and run["seed"] == 7 and run["task"] == plain["task"]
    assert run["optimizer"]["init_args"]["lr"] == plain["optimizer"]["lr"]
    assert made["data"]["data"]["corpus"]["class_path"] == "blockwright.training.data.text.TextFiles"


def test_no_logger_is_false_and_not_lightnings_default(checked: Callable[..., dict[str, Any]]) -> None:
    assert cli.to_cli(checked("logger=none"))["trainer"]["logger"] is False


def test_exported_file_reads_back_as_it_was(checked: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    plain = checked()
    path = cli.export(plain, tmp_path)
    assert path == tmp_path / "lightning_cli.yaml"
    assert yaml.safe_load(path.read_text()) == cli.to_cli(plain)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["fit"], ["fit", "--compose"]),
        (["fit", "--trainer.max_steps=3"], ["fit", "--compose", "--trainer.max_steps=3"]),
        (["fit", "--print_config"], ["fit", "--compose", "--print_config"]),
        (["validate", "--ckpt_path", "x"], ["validate", "--compose", "--ckpt_path", "x"]),
        (["fit", "--config", "x.yaml"], ["fit", "--config", "x.yaml"]),
        (["fit", "--config=x.yaml"], ["fit", "--config=x.yaml"]),
        (["fit", "--compose", "seed=1"], ["fit", "--compose", "seed=1"]),
        (["fit", "--help"], ["fit", "--help"]),
    ],
)
def test_default_composition_is_used_where_none_is_given(
    given: list[str], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(cli, "ComposedCLI", lambda *args, **kwargs: seen.append(sys.argv[1:]))
    cli.main(given)
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("words", "path", "value", "rule"),
    [
        (["--config", "{tmp}/nope.yaml"], "--config", "{tmp}/nope.yaml", "File does not exist: '{tmp}/nope.yaml'"),
        (["--config={tmp}/empty.yaml", "--nope"], "command line", "fit --config={tmp}/empty.yaml --nope", "--nope"),
        (
            ["--config={tmp}/empty.yaml", "--trainer.max_steps=abc"],
            *("--trainer.max_steps", "abc", "Expected a <class 'int'>. Got value: abc"),
        ),
    ],
)
def test_argument_that_is_not_taken_is_one_message_and_no_usage(
    words: list[str],
    path: str,
    value: str,
    rule: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.yaml").write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ConfigError) as caught:
        cli.main(["fit", *(word.replace("{tmp}", str(tmp_path)) for word in words)])
    assert (caught.value.path, caught.value.value) == (path, value.replace("{tmp}", str(tmp_path)))
    assert rule.replace("{tmp}", str(tmp_path)) in caught.value.rule and "fit --help" in caught.value.remedy
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--model.optimizer.lr=0.01", "--compose optimizer.lr=0.01"),
        ("--model.optimizer.init_args.lr=-3", "--compose optimizer.lr=-3"),
        ("--data.data.batch_size=4", "--compose data.batch_size=4"),
        ("--model.task.frozen=[a]", "--compose task.frozen=[a]"),
    ],
)
def test_value_inside_the_composition_is_refused_and_not_dropped(option: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        cli.main(["fit", "--compose", "model.n_layers=1", option])
    assert refused.value.path == option.partition("=")[0]
    assert remedy in refused.value.remedy


def test_keys_beside_a_class_path_are_arguments() -> None:
    node = {"class_path": "a.B", "init_args": {"x": 1}, "y": 2}
    assert to_targets(node) == {"_target_": "a.B", "x": 1, "y": 2}


def test_refusal_is_found_within_other_errors() -> None:
    refusal = ConfigError("data.batch_size", 0, "rule", "remedy")
    try:
        try:
            raise refusal
        except ConfigError as inner:
            try:
                raise TypeError("none of the types") from inner
            except TypeError:
                raise ValueError("union") from None
    except ValueError as error:
        assert cli._refusal_within(error) is refusal
    assert cli._refusal_within(ValueError("another")) is None
