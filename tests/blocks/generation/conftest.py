from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder


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


@pytest.fixture(scope="session")
def make(tiny: Callable[..., Any], randomise: Callable[..., None]) -> Callable[..., Decoder]:
    """A small decoder with every parameter random."""

    def build(dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
        decoder = compose(tiny(**changes)).eval()
        randomise(decoder)
        return decoder.to(dtype)

    return build
