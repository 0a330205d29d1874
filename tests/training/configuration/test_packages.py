"""The default callbacks and loggers without the packages that extras bring: refused before any training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.training.configuration import packages
from blockwright.training.configuration.composing import compose_config


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what ``pip install blockwright`` brings."""
    for name in ("scipy", "jinja2", "wandb", "tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("core")
def test_default_run_names_both_extras_in_one_message(checked: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError) as caught:
        checked("callbacks=default", "logger=[default,wandb]")
    assert caught.value.path == "logger.tensorboard and logger.wandb"
    assert "(tensorboard, wandb)" in caught.value.rule
    leave = "logger.tensorboard=null logger.wandb=null"
    assert caught.value.remedy == f"pip install 'blockwright[tensorboard,wandb]', or leave it out: {leave}"


@pytest.mark.usefixtures("core")
def test_either_package_that_lightning_takes_for_tensorboard_is_enough(
    checked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "has_package", lambda name: name == "tensorboardX")
    assert checked("callbacks=default", "logger=default")


def test_classes_are_those_of_conf() -> None:
    plain = compose_config(["callbacks=default", "logger=[default,wandb,mlflow]"], output_dir="x")
    nodes = [*plain.callbacks.values(), *plain.logger.values()]
    assert set(packages.NEEDS) <= {node["_target_"] for node in nodes}
