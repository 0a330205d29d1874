"""What an attention remembers between tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.ring import Ring
from blockwright.registry import BlockError

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


# --- rings ------------------------------------------------------------------------------------------------------------


def held(cache: Cache, got: tuple[Tensor, ...]) -> dict[int, float]:
    """Index of each token that was answered → its number."""
    return dict(zip(cache.indices(CPU).tolist(), got[0].flatten().tolist(), strict=True))


@pytest.mark.parametrize("chunks", [[1] * 12, [12], [3, 1, 1, 5, 2], [7, 5], [1, 11], [4, 4, 4]], ids=str)
def test_ring_answers_what_each_new_token_may_see(chunks: list[int]) -> None:
    ring, start = Ring(1, 4, {"k": (1,)}, torch.float32, CPU), 0
    for n in chunks:
        got = ring.append(torch.arange(start, start + n, dtype=torch.float32)[None, :, None])
        start += n
        first = max(0, start - n - 3)  # what the first new token sees
        assert held(ring, got) == {i: float(i) for i in range(first, start)}
        assert ring.length == start


def test_ring_holds_its_window_and_never_fills_up() -> None:
    ring = Ring(2, 4, {"k": (3,), "v": (2, 2)}, torch.bfloat16, CPU)
    before = ring.nbytes
    for _ in range(50):
        ring.append(torch.zeros(2, 3, 3), torch.zeros(2, 3, 2, 2))
    assert before == ring.nbytes == 2 * 4 * (3 + 4) * 2 and ring.length == 150


def test_ring_of_one_sees_the_new_token_alone() -> None:
    ring = Ring(1, 1, {"k": (1,)}, torch.float32, CPU)
    for i in range(3):
        assert held(ring, ring.append(torch.full((1, 1, 1), float(i)))) == {i: float(i)}


def test_ring_in_order_of_time_after_several_tokens() -> None:
    ring = Ring(1, 4, {"k": (1,)}, torch.float32, CPU)
    for i in range(6):
        ring.append(torch.full((1, 1, 1), float(i)))
    assert ring.append(torch.tensor([[[6.0], [7.0]]]))[0].flatten().tolist() == [3, 4, 5, 6, 7]
    assert ring.positions(CPU).tolist() == [[3, 4, 5, 6, 7]]


# --- padding ----------------------------------------------------------------------------------------------------------


def test_positions_leave_padding_out() -> None:
    cache = Cache(2, 5, {"k": (1,)}, torch.float32, CPU)
    cache.padding = torch.tensor([0, 2])
    cache.append(torch.zeros(2, 4, 1))
    assert cache.positions(CPU).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_padding_is_hidden_from_tokens_and_seen_by_itself() -> None:
    cache = Cache(2, 5, {"k": (1,)}, torch.float32, CPU)
    assert cache.padding_bias(1) is None
    cache.padding = torch.tensor([0, 2])
    cache.append(torch.zeros(2, 4, 1))
    bias = cache.padding_bias(3)
    assert bias is not None and bias.shape == (2, 1, 3, 4)
    inf = float("inf")
    assert bias[0].abs().sum() == 0
    assert bias[1, 0].tolist() == [[0, 0, 0, 0], [-inf, -inf, 0, 0], [-inf, -inf, 0, 0]]


def test_ring_hides_padding_by_where_tokens_stand() -> None:
    ring = Ring(1, 3, {"k": (1,)}, torch.float32, CPU)
    ring.padding = torch.tensor([3])
    for i in range(5):
        ring.append(torch.full((1, 1, 1), float(i)))
    bias = ring.padding_bias(1)
    assert bias is not None
    assert dict(zip(ring.indices(CPU).tolist(), bias.flatten().tolist(), strict=True)) == {2: -float("inf"), 3: 0, 4: 0}


# --- quantised --------------------------------------------------------------------------------------------------------

# Bytes of a token that has a slot of 128 + 32 numbers: codes, and 2 for each of 3 scales.
LATENT = {8: 160 + 6, 6: 120 + 6, 4: 80 + 6}


@pytest.mark.parametrize(("bits", "expected"), LATENT.items())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantised_bytes_are_codes_and_scales(bits: int, expected: int, device: str) -> None:
    where, parts = torch.device(device), {"latent": (128, 32)}
    cache = Cache(2, 5, {"latent": (160,)}, torch.float32, where, bits=bits, parts=parts)
    assert cache.nbytes == 2 * 5 * expected == sum(b.nbytes for b in cache.buffers.values())


@pytest.mark.parametrize("make", [Cache, Ring])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_quantised_answers_are_the_same_however_tokens_come(make: type[Cache], bits: int) -> None:
    x = torch.randn(2, 11, 2, 9, generator=torch.Generator().manual_seed(0))
    answers = []
    for chunks in ([11], [4, 7], [10, 1]):
        cache = make(2, 11, {"k": (2, 9)}, torch.float32, CPU, bits=bits)
        for part in x.split(chunks, 1):
            (got,) = cache.append(part)
        answers.append(got[:, cache.indices(CPU).argsort()])
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert 0 < (answers[0] - x).abs().max() < 4 / 2 ** (bits - 1)


def test_only_what_is_read_is_dequantised() -> None:
    cache = Cache(1, 1000, {"k": (4,)}, torch.float32, CPU, bits=8)
    (got,) = cache.append(torch.ones(1, 3, 4))
    assert got.shape == (1, 3, 4) and got.untyped_storage().nbytes() == 3 * 4 * 4


def test_answers_are_rounded_up_in_length_where_there_is_room() -> None:
    for bits in (None, 8):
        cache = Cache(1, 10, {"k": (1,)}, torch.float32, CPU, bits=bits)
        assert cache.append(torch.ones(1, 3, 1), multiple=4)[0].round().flatten().tolist() == [1, 1, 1, 0]
        assert cache.append(torch.ones(1, 6, 1), multiple=4)[0].shape == (1, 10, 1)
        assert cache.length == 9


@pytest.mark.parametrize("bits", [0, 5, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(BlockError, match="8, 6 or 4"):
        Cache(1, 1, {"k": (1,)}, torch.float32, CPU, bits=bits)
