"""Numbers as codes: packing and rounding, and attention that reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.kernels import coded_attention
from blockwright.blocks.kernels.choice import choose
from blockwright.blocks.kernels.coded_attention import (
    BITS,
    FEW,
    code_bytes,
    dequantise,
    group_sizes,
    pack,
    quantise,
    unpack,
)
from blockwright.blocks.kernels.scoring import Scoring
from tests.blocks.kernels.compared import drawn, off, pair, single


def back(x: Tensor, bits: int, sizes: list[int]) -> Tensor:
    return dequantise(*quantise(x, bits, sizes), bits, sizes, x.dtype)


def test_packing_keeps_every_code_in_no_more_bytes_than_promised() -> None:
    for bits in BITS:
        for width in (1, 2, 3, 4, 7, 23, 64, 160):
            draws = torch.randint(0, 2**bits, (3, 5, width), generator=torch.Generator().manual_seed(0))
            extremes = torch.tensor([0, 2**bits - 1]).repeat(width)[:width].expand(3, 5, -1)
            for codes in (draws.to(torch.uint8), extremes.to(torch.uint8)):
                packed = pack(codes, bits)
                assert packed.shape == (3, 5, code_bytes(width, bits)) and packed.dtype == torch.uint8
                assert torch.equal(unpack(packed, bits, width), codes)
    assert [[code_bytes(width, bits) for bits in BITS] for width in (64, 5)] == [[64, 48, 32], [5, 6, 3]]


def test_groups_cut_each_part_evenly_and_cross_none() -> None:
    sizes = {(64,): [64], (128, 32): [64, 64, 32], (96, 12): [48, 48, 12], (65,): [33, 32], (1,): [1]}
    assert {parts: group_sizes(list(parts)) for parts in sizes} == sizes
    x = torch.cat((torch.full((1, 64), 1000.0), torch.linspace(-1, 1, 32)[None]), -1)
    assert (back(x, 8, group_sizes([64, 32]))[:, 64:] - x[:, 64:]).abs().max() < 0.01  # which it does not coarsen


def test_no_number_moves_by_more_than_half_a_level_and_what_was_rounded_once_stays() -> None:
    sizes = group_sizes([128, 32])
    for bits, dtype in [*each(list(BITS), [torch.float64, torch.float32, torch.bfloat16]), (6, torch.bfloat16)]:
        x = drawn(7, 3, 160, dtype=dtype)
        once = back(x, bits, sizes)
        assert once.dtype == dtype and once.shape == x.shape
        for group, got in zip(x.double().split(sizes, -1), once.double().split(sizes, -1), strict=True):
            largest = group.abs().amax(-1, keepdim=True)
            level = largest / (2 ** (bits - 1) - 1)
            # of bf16 scales and values
            slack = 0.004 * largest + (0.004 * group.abs() if dtype == torch.bfloat16 else 0)
            assert ((group - got).abs() <= level / 2 + slack).all()
        single = back(drawn(4, 64).float(), bits, [64])
        torch.testing.assert_close(back(single, bits, [64]), single)
    for value in (0.0, 1e-30, 1e30):
        x = torch.full((2, 8), value)
        torch.testing.assert_close(back(x, 6, [8]), x, rtol=0.01, atol=0)


def test_what_cannot_be_computed_falls_through_to_dequantised_tokens() -> None:
    kernels, q, (keys, values) = choose(torch.device("cpu")), single(2, FEW + 1, 4, 16), pair(2, 21, 2, 16, 6)
    window, documents = Scoring(0.3, window=5), Scoring(0.3, segments=torch.arange(21).expand(2, -1) // 9)
    calls = [(q, Scoring(0.3)), (q[:, -1:].double(), Scoring(0.3)), (q[:, -1:], window), (q[:, -1:], documents)]
    with torch.no_grad():
        for some, scoring in calls:
            assert not coded_attention.suits(some, keys, values, scoring)
            assert off(kernels.attend_codes(some, keys, values, scoring), some, keys, values, scoring) < 2e-6
        assert coded_attention.suits(q[:, -1:], keys, values, Scoring(0.3))
    assert not coded_attention.suits(q[:, -1:], keys, values, Scoring(0.3))  # a gradient


# --- on GPUs, none of which runs here: nothing is shown of speed ------------------------------------------------------

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the extra absent_gpu")
# Triton decides when it is imported whether it interprets.
INTERPRETED = """
import json
import torch
from blockwright.blocks.kernels.coded_attention import BITS, Codes, coded_attention_reference, group_sizes, quantise
from blockwright.blocks.kernels.coded_attention import triton_attention, triton_suits
from blockwright.blocks.kernels.scoring import Scoring

draw, found = torch.Generator().manual_seed(0), {}

def drawn(*shape):
    return torch.randn(shape, generator=draw, dtype=torch.float32)

def stored(bits, S, parts, n_heads):
    sizes = group_sizes(parts)
    made = quantise(drawn(2, S + 5, sum(parts)), bits, sizes)
    return Codes(*made, bits, tuple(sizes), n_heads, sum(parts) // n_heads).some(slice(0, S))

with torch.no_grad():
    for bits in BITS:
        for T, N, K, H, S, latent in CALLS:
            q, keys = drawn(2, T, N, H), stored(bits, S, [latent, H - latent] if latent else [H] * K, K)
            values = keys._replace(width=latent) if latent else stored(bits, S, [H] * K, K)
            scoring = Scoring(H**-0.5, drawn(2, 1, T, S))
            assert triton_suits(q, keys, values, scoring)
            right = coded_attention_reference(q.double(), keys, values, scoring)
            y = triton_attention(q, keys, values, scoring)
            found[f"{bits} {T} {N} {K} {H} {S}"] = float((y - right).norm() / right.norm())
print(json.dumps(found))
"""
# Queries, heads, KV heads, width, tokens, latents of the width
CALLS = [(1, 4, 2, 33, 37, 0), (3, 5, 1, 97, 70, 80), (2, 6, 3, 10, 145, 0), (1, 16, 1, 576, 99, 512)]


@needs_triton
@pytest.mark.slow
def test_they_give_what_the_reference_gives_by_tritons_interpreter() -> None:
    script, settings = INTERPRETED.replace("CALLS", repr(CALLS)), {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert len(found) == 3 * len(CALLS) and max(found.values()) < 2e-6, found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["scores", "averages"])
@pytest.mark.parametrize(("bits", "capability"), [(8, 80), (6, 90), (4, 100)])
def test_they_compile_for_gpus_that_are_not_here(kernel: str, bits: int, capability: int) -> None:
    from tests.absent_gpu.device import GPUS
    from tests.absent_gpu.kernels import build_coded

    gpu = GPUS[f"sm_{capability}"]
    for rows, spilled in ((16, 64), (64, 2048)):
        built = build_coded(kernel, bits, rows, gpu)
        assert built.fault(gpu) is None and built.spilled <= spilled, (rows, built)
