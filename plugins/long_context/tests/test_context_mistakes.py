"""Mistakes with transforms and the callback: one error at the path of the setting, before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.training.entry.execute import execute

POSE = "data/transforms=pose"
CALLBACK = ["callbacks=long_context", "callbacks.report=null", "logger=none"]


@pytest.mark.parametrize(
    ("overrides", "path", "remedy"),
    [
        ([POSE], "data.transforms.pose.target", ""),
        ([POSE, "data.transforms.pose.target=4000"], "data.transforms", "max_positions to 4000"),
        ([POSE, "data.transforms.pose.target=16"], "data.transforms.pose.target", ""),
    ],
)
def test_transform_that_cannot_work_is_refused_by_preflight(
    overrides: list[str], path: str, remedy: str, checked: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError) as refused:
        checked(*overrides)
    assert refused.value.path == path and remedy in refused.value.remedy


@pytest.mark.parametrize(
    ("overrides", "path", "remedy"),
    [
        (["lengths=[8]", "window=8"], "lengths", "Write lengths of"),
        (["lengths=[4096]"], "lengths", "Write at most 64"),
        (["window=65"], "window", "before the extension"),
    ],
)
def test_callback_that_cannot_measure_is_refused_before_training(
    overrides: list[str], path: str, remedy: str, checked: Callable[..., Any]
) -> None:
    plain = checked(*CALLBACK, *(f"callbacks.long_context.{each}" for each in overrides))
    with pytest.raises(ConfigError) as refused:
        execute(plain)
    assert refused.value.path == f"callbacks.long_context.{path}" and remedy in refused.value.remedy
