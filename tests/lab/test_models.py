"""Models by name: which overrides are theirs."""

from __future__ import annotations

import pytest

from blockwright.lab.models import changes_model


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        *[("model.n_layers", True), ("model/attention", True), ("+model.mtp", True), ("~model/position", True)],
        *[("modelling", False), ("data", False), ("models.x", False), ("", False)],
    ],
)
def test_override_of_the_model(key: str, changes: bool) -> None:
    assert changes_model(key) is changes
