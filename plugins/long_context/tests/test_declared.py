"""The callbacks log the figures that they declare, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import test_figures as figures

pytestmark = pytest.mark.xdist_group("figures")
trained = figures.trained
CALLBACKS = [
    *("callbacks=[long_context,extrapolation]", "callbacks.extrapolation.multiples=[2]"),
    *(f"callbacks.long_context.{each}" for each in ("lengths=[64]", "samples=1", "symbols=[1,64]", "stretches=1")),
]


@pytest.mark.slow
def test_callbacks_log_what_they_declare(trained: Callable[..., Path]) -> None:
    folder = trained("long_context", ["test=true", *CALLBACKS])
    assert figures.undeclared(folder) == set()
    assert figures.unlogged("long_context", folder) == figures.unlogged("extrapolation", folder) == []
