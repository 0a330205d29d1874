"""Attention that reads codes gives what attention to dequantised tokens gives; small odd sizes are in test_seam.py."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.kernels import c_library, coded_attention, coded_library, coded_products, seam
from blockwright.blocks.kernels.choice import choose
from blockwright.blocks.kernels.coded_attention import FEW, coded_attention_reference
from blockwright.blocks.kernels.quantise import BITS, Codes, group_sizes, quantise
from blockwright.blocks.kernels.scoring import Scoring, Slopes

DRAW = torch.Generator()


@pytest.fixture(autouse=True)
def fixed() -> None:
    DRAW.manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAW, dtype=torch.float32)


def stored(B: int, S: int, K: int, H: int, bits: int) -> Codes:
    """Of S tokens in a cache with room for more."""
    sizes = group_sizes([H] * K)
    return Codes(*quantise(drawn(B, S + 7, K * H), bits, sizes), bits, tuple(sizes), K, H).some(slice(0, S))


def off(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


WAYS = {"compiled": coded_products.compiled_attention, "parts": coded_attention.attend_in_parts}


@pytest.mark.parametrize("threads", [3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", BITS)
def test_long_caches_of_several_rows_give_what_dequantised_ones_give(
    bits: int, way: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many parts, tiles and threads, none of which the length is a multiple of."""
    monkeypatch.setattr(coded_attention, "PART", 2**14)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for B, K, N, H in ((3, 2, 10, 33), (1, 1, 3, 100)):
            q, keys, values = drawn(B, 2, N, H), stored(B, 1021, K, H, bits), stored(B, 1021, K, H, bits)
            scoring = Scoring(H**-0.5)
            right = coded_attention_reference(q.double(), keys, values, scoring)
            assert off(WAYS[way](q, keys, values, scoring), right) < 2e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", BITS)
def test_every_number_is_decoded(bits: int, way: str) -> None:
    """A query and a token alone see one number each, whatever byte and bits it is in."""
    for width in (1, 2, 3, 5, 16, 31, 64, 67):
        keys, values = stored(1, 1, 1, width, bits), stored(1, 1, 1, width, bits)
        y = WAYS[way](drawn(1, 1, 1, width), keys, values, Scoring(1.0))
        torch.testing.assert_close(y, values.numbers(torch.float32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_padding_slopes_and_rows_that_see_nothing_of_a_part(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_attention, "PART", 2**10)
    B, T, S, N = 3, 2, 203, 4
    q, keys, values = drawn(B, T, N, 8), stored(B, S, 2, 8, 6), stored(B, S, 2, 8, 6)
    hidden = torch.arange(S) < torch.tensor([0, 150, 201])[:, None]
    padding = torch.zeros(B, 1, T, S).masked_fill_(hidden[:, None, None], float("-inf"))
    places = torch.arange(S)[None]
    for bias in (padding, Slopes(drawn(N).abs(), places[:, -T:], places)):
        right = coded_attention_reference(q.double(), keys, values, Scoring(0.3, bias))
        assert off(WAYS[way](q, keys, values, Scoring(0.3, bias)), right) < 2e-6


def test_what_cannot_be_computed_falls_through_to_dequantised_tokens() -> None:
    kernels, keys = choose(torch.device("cpu")), stored(2, 21, 2, 16, 6)
    values, q = stored(2, 21, 2, 16, 6), drawn(2, FEW + 1, 4, 16)
    window, documents = Scoring(0.3, window=5), Scoring(0.3, segments=torch.arange(21).expand(2, -1) // 9)
    calls: list[tuple[Tensor, Scoring]] = [(q, Scoring(0.3)), (q[:, -1:].double(), Scoring(0.3))]
    calls += [(q[:, -1:], scoring) for scoring in (window, documents)]
    for given, scoring in calls:
        with torch.no_grad():
            assert not coded_attention.suits(given, keys, values, scoring)
            y = kernels.attend_codes(given, keys, values, scoring)
        assert off(y, coded_attention_reference(given.double(), keys, values, scoring)) < 2e-6
    assert not coded_attention.suits(q[:, -1:], keys, values, Scoring(0.3))  # a gradient
    with torch.no_grad():
        assert coded_attention.suits(q[:, -1:], keys, values, Scoring(0.3))


@pytest.fixture
def forgotten() -> Any:
    """The library is looked for again, and afterwards once more."""
    for each in (c_library.loaded, coded_library.library):
        each.cache_clear()
    yield
    for each in (c_library.loaded, coded_library.library):
        each.cache_clear()


@pytest.mark.parametrize("trouble", ["no compiler", "one that fails", "one that hangs", "a library that does not load"])
def test_without_a_compiler_the_same_is_computed_by_parts(
    trouble: str, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(command: list[str], **given: Any) -> None:
        if trouble == "one that fails":
            raise subprocess.CalledProcessError(1, command)
        if trouble == "one that hangs":
            raise subprocess.TimeoutExpired(command, 60)
        Path(command[command.index("-o") + 1]).write_bytes(b"no library")

    if trouble == "no compiler":
        monkeypatch.setattr(c_library.shutil, "which", lambda name: None)
    monkeypatch.setattr(c_library.subprocess, "run", runs)
    assert coded_library.library() is None
    q, keys, values = drawn(1, 1, 4, 16), stored(1, 21, 2, 16, 4), stored(1, 21, 2, 16, 4)
    with torch.no_grad():
        assert not coded_products.suits(q, keys, values, Scoring(0.3))
        y = choose(torch.device("cpu")).attend_codes(q, keys, values, Scoring(0.3))
    assert off(y, coded_attention_reference(q.double(), keys, values, Scoring(0.3))) < 2e-6


@pytest.mark.slow
def test_compiling_leaves_nothing_behind_and_its_mode_is_that_of_the_process(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code compiled for speed at any price would round tiny numbers to 0 in the whole process."""
    monkeypatch.setattr(c_library.tempfile, "tempdir", str(tmp_path))
    if coded_library.library() is None:
        pytest.skip("no C compiler here")
    assert not list(tmp_path.iterdir())
    assert torch.full((1,), 1e-40).mul(1.0).item() > 0


def test_order_of_the_ways_is_the_one_that_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "speed.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| `coded_attention`"))
    for implementation in seam.implementations("coded_attention"):
        assert f"`{implementation}`" in row
