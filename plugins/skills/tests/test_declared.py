"""The callback logs the figures that it declares, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import test_figures as figures

pytestmark = pytest.mark.xdist_group("figures")
trained = figures.trained


@pytest.mark.slow
def test_the_callback_logs_what_it_declares(trained: Callable[..., Path]) -> None:
    chosen = ["data=skills", "data.skill=[depth]", "data.held_out=4", "task=recall", "callbacks=skills"]
    folder = trained("skills", [*chosen, "callbacks.skills.samples=2"])
    assert figures.undeclared(folder) == set()
    assert figures.unlogged("skills", folder) == []
