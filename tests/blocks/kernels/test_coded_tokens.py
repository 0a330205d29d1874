"""Tokens become the same codes and scales in C as by torch, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockwright.blocks.cache.stores import Quantised
from blockwright.blocks.kernels import coded_library, coded_tokens
from blockwright.blocks.kernels.coded_tokens import A_THREAD, store, store_compiled, store_reference, suits
from blockwright.blocks.kernels.quantise import BITS, Codes, code_bytes, group_sizes

# heads, widths of the parts that share no scale
SHAPES = [(1, [1]), (1, [2]), (1, [3]), (1, [7, 1]), (1, [20, 6]), (2, [33, 33]), (3, [67] * 3), (1, [512, 64])]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

needs_compiler = pytest.mark.skipif(coded_library.library() is None, reason="no C compiler here")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def room(B: int, T: int, heads: int, parts: list[int], bits: int) -> Codes:
    """For T tokens in the middle of a cache, whose bytes all have a value before."""
    width, sizes = sum(parts), tuple(group_sizes(parts))
    codes = torch.full((B, T + 5, code_bytes(width, bits)), 170, dtype=torch.uint8)
    scales = torch.full((B, T + 5, len(sizes)), 0.5, dtype=torch.bfloat16)
    return Codes(codes, scales, bits, sizes, heads, width // heads).some(slice(2, T + 2))


def same(a: Codes, b: Codes) -> bool:
    """Whether two rooms are equal, those of the tokens before and after them included."""
    bytes_ = (t._base if t._base is not None else t for of in (a, b) for t in (of.codes, of.scales.view(torch.int16)))
    first, second, third, fourth = bytes_
    return torch.equal(first, third) and torch.equal(second, fourth)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_equal_those_of_torch(bits: int, dtype: torch.dtype) -> None:
    for heads, parts in SHAPES:
        for size in (1.0, 1e-38, 1e-42, 1e36, 0.0):
            x = (drawn(3, 5, sum(parts)) * size).to(dtype)
            right, made = (room(3, 5, heads, parts, bits) for _ in range(2))
            store_reference(x, right)
            store_compiled(x, made)
            assert same(right, made), (parts, size)


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_numbers_halfway_between_two_levels_go_to_the_even_one(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    halves = (torch.arange(-31, 32) + 0.5).clamp(-top, top)
    x = torch.cat((halves, torch.tensor([float(top)])))[None, None]
    right, made = (room(1, 1, 1, [64], bits) for _ in range(2))
    store_reference(x, right)
    store_compiled(x, made)
    assert same(right, made) and right.scales[0, 0, 0] == 1


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_scales_halfway_between_two_of_bf16_go_to_the_even_one(bits: int) -> None:
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    right, made = (room(1, 1, 2, [1, 1], bits) for _ in range(2))
    store_reference(halves[None, None] * (2 ** (bits - 1) - 1), right)
    store_compiled(halves[None, None] * (2 ** (bits - 1) - 1), made)
    assert same(right, made) and made.scales.tolist() == [[[1.0, 1 + 2**-6]]]


@needs_compiler
@pytest.mark.parametrize("wrong", [0x7FC00000, 0x7FFFFFFF, 0x7F800000, -0x800000])  # two of no number; ± infinity
def test_what_is_no_number_shows_in_the_scale(wrong: int) -> None:
    x = drawn(1, 1, 12).float()
    x.view(torch.int32)[0, 0, 7] = wrong
    right, made = (room(1, 1, 1, [6, 6], 6) for _ in range(2))
    store_reference(x, right)
    store_compiled(x, made)
    torch.testing.assert_close(made.scales, right.scales, rtol=0, atol=0, equal_nan=True)
    assert made.scales[0, 0, 0].isfinite() and not made.scales[0, 0, 1].isfinite()


@needs_compiler
def test_many_tokens_of_a_strided_tensor_by_several_threads() -> None:
    x, before = drawn(2, 40, 3 * A_THREAD + 1).float().transpose(1, 2), torch.get_num_threads()
    right, made = (room(2, x.shape[1], 2, [20, 20], 6) for _ in range(2))
    store_reference(x, right)
    torch.set_num_threads(3)
    try:
        store_compiled(x, made)
    finally:
        torch.set_num_threads(before)
    assert same(right, made)


@needs_compiler
def test_a_cache_uses_the_library_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for way in (store_compiled, store_reference):
        name = way.__name__
        monkeypatch.setattr(coded_tokens, name, lambda x, into, n=name, way=way: (calls.append(n), way(x, into)))
    held = Quantised(2, 9, (3, 8), torch.float32, torch.device("cpu"), 6, [8, 8, 8])
    values = drawn(2, 2, 24).float().unflatten(2, (3, 8))
    with torch.no_grad():
        held.write(slice(4, 6), values)
        assert torch.equal(held.read(slice(4, 6)), held.rounded(values))
        held.write(slice(0, 2), values[:1])  # broadcast over rows
        assert torch.equal(held.read(slice(0, 2))[1], held.rounded(values)[0])
    held.write(slice(2, 4), values)  # a gradient might be needed
    assert calls == ["store_compiled", "store_reference", "store_reference"]


def test_more_or_fewer_numbers_than_there_is_room_for_are_refused() -> None:
    for shape in ((1, 3, 12), (1, 2, 11), (1, 2, 13)):
        into = room(1, 2, 1, [6, 6], 6)
        with torch.no_grad():
            assert not suits(drawn(*shape), into)
            with pytest.raises((RuntimeError, ValueError)):
                store(drawn(*shape), into)


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_tokens, "library", lambda: None)
    x, right, made = drawn(1, 2, 12), room(1, 2, 1, [6, 6], 6), room(1, 2, 1, [6, 6], 6)
    store_reference(x, right)
    with torch.no_grad():
        assert not suits(x, made)
        store(x, made)
    assert same(right, made)
