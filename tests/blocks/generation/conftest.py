from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from blockwright.blocks.cache.base import Cache


@pytest.fixture(scope="module", autouse=True)
def rows_with_a_history() -> Iterator[None]:
    """All that a batch holds of a row is NaN before another job gets the row."""
    put = Cache.put

    def put_over_nan(cache: Cache, row: int, *other: Any) -> None:
        for held in cache.buffers.values():
            held[row].fill_(math.nan if held.is_floating_point() else 255)
        put(cache, row, *other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "put", put_over_nan)
        yield
