"""Where the configurations of the user are, and what of them every command finds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockwright.registry import ConfigError, user_conf
from blockwright.registry.user_conf import VARIABLE, folders, taken
from blockwright.training.configuration import conf
from blockwright.training.configuration.composing import compose_config


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes files into a folder that is the working folder."""
    monkeypatch.setenv(VARIABLE, "")  # so that it is what it was afterwards
    monkeypatch.delenv(VARIABLE)
    monkeypatch.chdir(tmp_path)

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            file = tmp_path / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


MINE = {"conf__experiment__mine.yaml": "# @package _global_\nseed: 77\n", "conf__config.yaml": "of: another program"}


def test_options_in_the_folder_conf_are_found(repository: Callable[..., Path]) -> None:
    repository(**MINE, **{"conf__model__ffn__wide.yaml": "name: swiglu\nd_ff: 512\n"})
    found = compose_config(["experiment=mine", "model/ffn=wide"])
    assert (found.seed, found.model.ffn.d_ff) == (77, 512)
    assert "mine" in conf.options("experiment") and "model/ffn" in conf.of_files()


def test_what_is_named_comes_before_what_is_found(repository: Callable[..., Path]) -> None:
    here = repository(**MINE, **{f"{name}__experiment__mine.yaml": "" for name in ("other", "third", "sub")})
    assert folders() == [here / "conf"]
    (here / "pyproject.toml").write_text('[tool.blockwright]\nconf = "other"\n')
    user_conf._declared.cache_clear()
    assert folders() == [here / "other"]
    os.chdir(here / "sub")
    assert folders() == [here / "other"]  # named by the nearest pyproject.toml
    os.chdir(here)
    assert taken(["seed=1", "--config-dir", "third", "-cd=sub", "--json"]) == ["seed=1", "--json"]
    assert folders() == [here / "third", here / "sub"] and os.environ[VARIABLE] == f"third{os.pathsep}sub"
    assert taken([*user_conf.flags(), "x"]) == ["x"] and len(folders()) == 2  # as in another process


def test_the_variable_may_say_that_there_is_none(
    repository: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(**MINE)
    monkeypatch.setenv(VARIABLE, "")
    assert folders() == []


def test_a_checkout_of_this_project_has_none_of_the_users(repository: Callable[..., Path]) -> None:
    repository(**{"pyproject.toml": '[project]\nname = "blockwright"\n', "conf__trainer__ddp.yaml": ""})
    user_conf._declared.cache_clear()
    assert folders() == []


@pytest.mark.parametrize(
    ("files", "path"),
    [
        ({"conf__trainer__ddp.yaml": ""}, "trainer"),
        ({"pyproject.toml": '[tool.blockwright]\nconf = "gone"\n'}, "tool.blockwright.conf"),
        ({"pyproject.toml": "[tool.blockwright]\nconf = 1\n"}, "tool.blockwright.conf"),
        ({"pyproject.toml": "[tool.blockwright]\nconf = '.'\n", **MINE}, "tool.blockwright.conf"),
    ],
    ids=["an option of ours", "no such folder", "no name", "no options"],
)
def test_refused(repository: Callable[..., Path], files: dict[str, str], path: str) -> None:
    repository(**files)
    user_conf._declared.cache_clear()
    with pytest.raises(ConfigError) as caught:
        compose_config([])
    assert path in caught.value.path


@pytest.mark.parametrize(
    "arguments", [["--config-dir"], ["-cd="], ["seed=1", "-cd"], ["--config-dir", "no"], ["-cd=conf/experiment"]]
)
def test_a_flag_without_its_folder_is_refused(repository: Callable[..., Path], arguments: list[str]) -> None:
    repository(**MINE)
    with pytest.raises(ConfigError) as caught:
        taken(arguments)
    assert caught.value.path == "--config-dir"
