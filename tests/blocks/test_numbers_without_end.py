"""Numbers that would take days, or overflow, are refused before anything is computed."""

from collections.abc import Callable
from typing import Any

import pytest

from blockwright.blocks.compose import check
from blockwright.registry import ConfigError

DRAWN = {"name": "poisson_lognormal"}
WRONG = {
    "model.memory.ordinal": {"memory": {"name": "engram", "rows": 37, "ordinal": 10**12}},
    "model.loop.visit_draw.mean": {"loop": {"name": "cycle", "visit_draw": {**DRAWN, "mean": 1e300}}},
    "model.loop.visit_draw.sigma": {"loop": {"name": "cycle", "visit_draw": {**DRAWN, "sigma": 1e160}}},
    "model.loop.visit_draw.most": {"loop": {"name": "cycle", "visit_draw": {"name": "uniform", "most": 10**12}}},
    "model.memory.taps": {"memory": {"name": "engram", "rows": 37, "taps": 10**8}},
    "model.attention.taps": {"attention": {"name": "kda", "taps": 10**8}},
    "model.attention.key_conv.taps": {"attention": {"name": "gqa", "key_conv": {"name": "canon", "taps": 10**8}}},
}


@pytest.mark.parametrize("path", WRONG)
def test_numbers_without_end_are_refused(tiny: Callable[..., dict[str, Any]], path: str) -> None:
    with pytest.raises(ConfigError, match=r"at most|below") as refusal:
        check(tiny(**WRONG[path]))
    assert refusal.value.path == path
