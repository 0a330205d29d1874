"""The default callbacks and loggers without the packages that extras bring: refused before any training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from blockwright.lab.run_report import RunReport
from blockwright.registry import ConfigError
from blockwright.training.configuration import packages
from blockwright.training.configuration.composing import compose_config


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what ``pip install blockwright`` brings."""
    for name in ("matplotlib", "scipy", "jinja2", "tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("core")
def test_default_run_names_both_extras_in_one_message(checked: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError) as caught:
        checked("callbacks=default", "logger=default")
    assert caught.value.path == "callbacks.report and logger.tensorboard"
    assert "(matplotlib, tensorboard)" in caught.value.rule
    leave = "callbacks.report=null logger.tensorboard=null"
    assert caught.value.remedy == f"pip install 'blockwright[lab,tensorboard]', or leave it out: {leave}"


@pytest.mark.usefixtures("core")
def test_run_without_them_passes(checked: Callable[..., dict[str, Any]]) -> None:
    plain = checked("callbacks=default", "logger=default", "callbacks.report=null", "logger.tensorboard=null")
    assert plain["logger"]["csv"]


@pytest.mark.usefixtures("core")
def test_either_package_that_lightning_takes_for_tensorboard_is_enough(
    checked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "has_package", lambda name: name in ("matplotlib", "tensorboardX"))
    assert checked("callbacks=default", "logger=default")


def test_classes_are_those_of_conf() -> None:
    plain = compose_config(["callbacks=default", "logger=[default,wandb,mlflow]"], output_dir="x")
    nodes = [*plain.callbacks.values(), *plain.logger.values()]
    assert set(packages.NEEDS) <= {node["_target_"] for node in nodes}


@pytest.mark.usefixtures("core")
def test_report_of_a_run_built_in_python_is_refused_before_the_training_too(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.report = None.*pip install 'blockwright\[lab\]'"):
        RunReport(str(tmp_path))
