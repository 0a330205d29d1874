"""Storing codes in C bit by bit as by torch, and attention that reads them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blockwright.blocks.cache.base import Quantised
from blockwright.blocks.kernels import coded_attention
from blockwright.blocks.kernels.choice import choose
from blockwright.blocks.kernels.coded_attention import BITS, Codes, code_bytes, group_sizes
from blockwright.blocks.kernels.coded_attention import store as store_reference
from blockwright.blocks.kernels.scoring import Scoring, Slopes
from blockwright.blocks.kernels.seam import chain, compute
from blockwright.plugins.fast_cpu import c_library, codes
from blockwright.plugins.fast_cpu.codes import A_THREAD, store_compiled
from tests.blocks.kernels.compared import drawn, off, pair, single, spy, threads

# --- tokens that become codes -----------------------------------------------------------------------------------------

# heads, widths of the parts that share no scale
SHAPES = [(1, [1]), (1, [2]), (1, [3]), (1, [7, 1]), (1, [20, 6]), (2, [33, 33]), (3, [67] * 3), (1, [512, 64])]
needs_compiler = pytest.mark.skipif(codes.library() is None, reason="no C compiler here")


def room(B: int, T: int, heads: int, parts: list[int], bits: int) -> Codes:
    """For T tokens in the middle of a cache, whose bytes all have a value before."""
    width, sizes = sum(parts), tuple(group_sizes(parts))
    codes = torch.full((B, T + 5, code_bytes(width, bits)), 170, dtype=torch.uint8)
    scales = torch.full((B, T + 5, len(sizes)), 0.5, dtype=torch.bfloat16)
    return Codes(codes, scales, bits, sizes, heads, width // heads).some(slice(2, T + 2))


def same(a: Codes, b: Codes) -> bool:
    """Whether two rooms are equal, those of the tokens before and after them included."""
    bytes_ = [t._base if t._base is not None else t for of in (a, b) for t in (of.codes, of.scales.view(torch.int16))]
    return torch.equal(bytes_[0], bytes_[2]) and torch.equal(bytes_[1], bytes_[3])


def both(x: Tensor, heads: int, parts: list[int], bits: int) -> tuple[Codes, Codes]:
    """Stored by torch, and in C."""
    right, made = (room(x.shape[0], x.shape[1], heads, parts, bits) for _ in range(2))
    store_reference(x, right)
    store_compiled(x, made)
    return right, made


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_equal_those_of_torch(bits: int, vectors: None) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for heads, parts in SHAPES:
            for size in (1.0, 1e-38, 1e-42, 1e36, 0.0):
                assert same(*both((drawn(3, 5, sum(parts)) * size).to(dtype), heads, parts, bits)), (parts, size)
    top = 2 ** (bits - 1) - 1
    halves = torch.cat(((torch.arange(-31, 32) + 0.5).clamp(-top, top), torch.tensor([float(top)])))[None, None]
    right, made = both(halves, 1, [64], bits)  # between two levels: to the even one
    assert same(right, made) and right.scales[0, 0, 0] == 1
    right, made = both(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])[None, None] * top, 2, [1, 1], bits)  # two scales
    assert same(right, made) and made.scales.tolist() == [[[1.0, 1 + 2**-6]]]


@needs_compiler
def test_what_is_no_number_shows_in_the_scale() -> None:
    for wrong in (0x7FC00000, 0x7FFFFFFF, 0x7F800000, -0x800000):  # two of no number; ± infinity
        x = drawn(1, 1, 12).float()
        x.view(torch.int32)[0, 0, 7] = wrong
        right, made = both(x, 1, [6, 6], 6)
        torch.testing.assert_close(made.scales, right.scales, rtol=0, atol=0, equal_nan=True)
        assert made.scales[0, 0, 0].isfinite() and not made.scales[0, 0, 1].isfinite()


@needs_compiler
def test_many_tokens_of_a_strided_tensor_by_several_threads() -> None:
    with threads(3):
        assert same(*both(drawn(2, 40, 3 * A_THREAD + 1).float().transpose(1, 2), 2, [20, 20], 6))


@needs_compiler
def test_a_cache_uses_the_library_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "coding")
    held = Quantised(2, 9, (3, 8), torch.float32, torch.device("cpu"), 6, [8, 8, 8])
    values = drawn(2, 2, 24).float().unflatten(2, (3, 8))
    with torch.no_grad():
        held.write(slice(4, 6), values)
        assert torch.equal(held.read(slice(4, 6)), held.rounded(values))
        held.write(slice(0, 2), values[:1])  # broadcast over rows
        assert torch.equal(held.read(slice(0, 2))[1], held.rounded(values)[0])
    held.write(slice(2, 4), values)  # a gradient might be needed
    assert [name for name, _ in calls] == ["compiled", "torch", "torch"]
    chain.cache_clear()


@torch.no_grad()
def test_numbers_without_room_are_refused_and_without_a_compiler_torch_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for shape in ((1, 3, 12), (1, 2, 11), (1, 2, 13)):
        into = room(1, 2, 1, [6, 6], 6)
        assert not codes.suits_store(drawn(*shape), into)
        with pytest.raises((RuntimeError, ValueError)):
            compute("coding", drawn(*shape), into)
    monkeypatch.setattr(codes, "library", lambda: None)
    x, right, made = drawn(1, 2, 12), room(1, 2, 1, [6, 6], 6), room(1, 2, 1, [6, 6], 6)
    store_reference(x, right)
    assert not codes.suits_store(x, made)
    compute("coding", x, made)
    assert same(right, made)


# --- attention that reads codes; small odd sizes are in test_seam.py --------------------------------------------------


WAYS = {"compiled": codes.compiled_attention, "parts": coded_attention.attend_in_parts}


@pytest.mark.parametrize("way", WAYS)
def test_long_caches_of_several_rows_give_what_dequantised_ones_give(
    way: str, vectors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many parts, tiles and threads, none of which the length is a multiple of."""
    for bits in BITS:
        monkeypatch.setattr(coded_attention, "PART", 2**14)
        for B, K, N, H in ((3, 2, 10, 33), (1, 1, 3, 100)):
            given = single(B, 2, N, H), *pair(B, 1021, K, H, bits), Scoring(H**-0.5)
            with threads(3):
                assert off(WAYS[way](*given), *given) < 2e-6
        for width in (1, 2, 3, 5, 16, 31, 64, 67):  # one number each, whatever byte and bits it is in
            keys, values = pair(1, 1, 1, width, bits)
            y = WAYS[way](single(1, 1, 1, width), keys, values, Scoring(1.0))
            torch.testing.assert_close(y, values.numbers(torch.float32), rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(coded_attention, "PART", 2**10)
    B, T, S, N = 3, 2, 203, 4
    hidden = torch.arange(S) < torch.tensor([0, 150, 201])[:, None]
    padding = torch.zeros(B, 1, T, S).masked_fill_(hidden[:, None, None], float("-inf"))
    places = torch.arange(S)[None]
    for bias in (padding, Slopes(single(N).abs(), places[:, -T:], places)):  # rows that see nothing of a part
        given = single(B, T, N, 8), *pair(B, S, 2, 8, 6), Scoring(0.3, bias)
        assert off(WAYS[way](*given), *given) < 2e-6


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The library is looked for again, and afterwards once more."""
    for found in (c_library.loaded, codes.library):
        found.cache_clear()
    yield
    for found in (c_library.loaded, codes.library):
        found.cache_clear()


@pytest.mark.parametrize("trouble", ["no compiler", "one that fails", "one that hangs", "a library that does not load"])
@torch.no_grad()
def test_without_a_compiler_the_same_is_computed_by_parts(
    trouble: str, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(command: list[str], **given: object) -> None:
        if trouble == "one that fails":
            raise subprocess.CalledProcessError(1, command)
        if trouble == "one that hangs":
            raise subprocess.TimeoutExpired(command, 60)
        Path(command[command.index("-o") + 1]).write_bytes(b"no library")

    if trouble == "no compiler":
        monkeypatch.setattr(c_library.shutil, "which", lambda name: None)
    monkeypatch.setattr(c_library.subprocess, "run", runs)
    given = single(1, 1, 4, 16), *pair(1, 21, 2, 16, 4), Scoring(0.3)
    assert codes.library() is None and not codes.suits(*given)
    assert off(choose(torch.device("cpu")).attend_codes(*given), *given) < 2e-6


@pytest.mark.slow
def test_compiling_leaves_nothing_behind_and_its_mode_is_that_of_the_process(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code compiled for speed at any price would round tiny numbers to 0 in the whole process."""
    monkeypatch.setattr(c_library.tempfile, "tempdir", str(tmp_path))
    if codes.library() is None:
        pytest.skip("no C compiler here")
    assert not list(tmp_path.iterdir())
    assert torch.full((1,), 1e-40).mul(1.0).item() > 0
