"""Caches are counted before they are allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blockwright.blocks.cache import fit
from blockwright.blocks.compose import compose
from blockwright.blocks.generation.joining import joinable_caches_of_depths
from blockwright.registry import BlockError

ATTENTIONS = ("gqa", "mla", "sliding_window", "gated_delta")


@pytest.mark.parametrize("bits", [None, 6])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_caches_of_the_whole_memory_are_made_and_those_of_a_byte_more_are_refused(
    tiny: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, attention: str, bits: int | None
) -> None:
    decoder = compose(tiny(attention=attention, n_layers=2))
    needed = sum(cache.nbytes for cache in decoder.new_caches(3, 37, bits))
    monkeypatch.setattr(fit, "device_memory", lambda device: needed)
    assert sum(cache.nbytes for cache in decoder.new_caches(3, 37, bits)) == needed
    monkeypatch.setattr(fit, "device_memory", lambda device: needed - 1)
    with pytest.raises(BlockError, match="memory of cpu") as refused:
        decoder.new_caches(3, 37, bits)
    assert refused.value.parameter == "caches"


@pytest.mark.parametrize(("rows", "length"), [(1, 2**70), (2**70, 1), (2**20, 2**20)])
def test_sizes_that_no_number_of_64_bits_holds_are_refused(
    tiny: Callable[..., dict[str, Any]], rows: int, length: int
) -> None:
    decoder = compose(tiny(mtp={"depth": 1}))
    with pytest.raises(BlockError, match="memory of cpu"):
        decoder.new_caches(rows, length)
    with pytest.raises(BlockError, match="memory of cpu"):
        joinable_caches_of_depths(decoder, 1, rows, length, None)
