"""What needs a package that is not installed names the extra that brings it."""

from __future__ import annotations

import sys

import pytest

from blockwright.registry import ConfigError
from blockwright.registry.extras import require


def test_missing_packages_are_named_and_those_that_are_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "missing_one", None)
    require("lab", "json", path="part")
    with pytest.raises(ConfigError) as caught:
        require("lab", "json", "missing_one", "missing_two", path="part", value=3, otherwise="or write part=2")
    assert (caught.value.path, caught.value.value) == ("part", 3)
    assert caught.value.rule == "needs a package that is not installed (missing_one, missing_two)"
    assert caught.value.remedy == "pip install 'blockwright[lab]', or write part=2"
