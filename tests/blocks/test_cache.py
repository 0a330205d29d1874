"""What an attention remembers between tokens."""

from __future__ import annotations

import pytest
import torch

from blocks.cache import Cache
from registry import BlockError

CPU = torch.device("cpu")


def test_everything_stored_comes_back_in_order() -> None:
    cache = Cache(2, 5, {"k": (3,), "v": (2, 2)}, torch.float32, CPU)
    k, v = torch.randn(2, 5, 3), torch.randn(2, 5, 2, 2)
    for start, end in ((0, 2), (2, 3), (3, 5)):
        got = cache.append(k[:, start:end], v[:, start:end])
        assert torch.equal(got[0], k[:, :end]) and torch.equal(got[1], v[:, :end])
        assert cache.length == end and cache.positions(CPU).tolist() == [list(range(end))]


def test_bytes_are_those_of_the_whole_room_from_the_start() -> None:
    cache = Cache(2, 5, {"k": (3,), "v": (2, 2)}, torch.bfloat16, CPU)
    before = cache.nbytes
    cache.append(torch.zeros(2, 1, 3), torch.zeros(2, 1, 2, 2))
    assert before == cache.nbytes == 2 * 5 * (3 + 4) * 2


def test_full_cache_refuses_with_its_room_and_stays_as_it_was() -> None:
    cache = Cache(1, 3, {"k": (1,)}, torch.float32, CPU)
    cache.append(torch.ones(1, 2, 1))
    with pytest.raises(BlockError, match="room for 3"):
        cache.append(torch.zeros(1, 2, 1))
    assert cache.length == 2
    (k,) = cache.append(torch.full((1, 1, 1), 5.0))
    assert k.flatten().tolist() == [1, 1, 5]


def test_caches_share_nothing() -> None:
    one, other = (Cache(1, 2, {"k": (1,)}, torch.float32, CPU) for _ in range(2))
    one.append(torch.ones(1, 1, 1))
    assert other.length == 0 and (other.buffers["k"] == 0).all()
