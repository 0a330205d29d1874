"""Convolutions are computed tap by tap, so numbers of taps without end are refused before anything is computed."""

from collections.abc import Callable
from typing import Any

import pytest

from blockwright.blocks.compose import check
from blockwright.registry import ConfigError

WRONG = {
    "model.memory.taps": {"memory": {"name": "engram", "rows": 37, "taps": 10**8}},
    "model.attention.taps": {"attention": {"name": "kda", "taps": 10**8}},
    "model.attention.key_conv.taps": {"attention": {"name": "gqa", "key_conv": {"name": "canon", "taps": 10**8}}},
}


@pytest.mark.parametrize("path", WRONG)
def test_taps_without_end_are_refused(tiny: Callable[..., dict[str, Any]], path: str) -> None:
    with pytest.raises(ConfigError, match="at most 1024") as refusal:
        check(tiny(**WRONG[path]))
    assert refusal.value.path == path
