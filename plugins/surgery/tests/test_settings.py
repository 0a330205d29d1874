"""The settings in which two blocks differ, as surgery compares them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from blockwright.plugins.surgery.settings import differences, shown


class Part(nn.Module):
    def __init__(self, **own: Any) -> None:
        super().__init__()
        vars(self).update(own)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"a": "none"}, {}, "a none → none"),
        ({"a": (True,)}, {"a": (1,)}, "a (True,) → (1,)"),
        ({"a": [1, (True, 2)]}, {"a": [1, (1, 2)]}, "a (1, (True, 2)) → (1, (1, 2))"),
        ({"a": (1, 2)}, {"a": (1,)}, "a (1, 2) → (1,)"),
        ({"a": 5}, {}, "a 5 → none"),
    ],
)
def test_what_differs_is_named(old: dict[str, Any], new: dict[str, Any], words: str) -> None:
    assert shown(differences(Part(**old), Part(**new))) == words


@pytest.mark.parametrize(("old", "new"), [({"a": None}, {}), ({"a": (1, 2)}, {"a": [1.0, 2]}), ({"a": 1}, {"a": 1.0})])
def test_what_is_the_same_is_not(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert not differences(Part(**old), Part(**new)) and not differences(Part(**new), Part(**old))
