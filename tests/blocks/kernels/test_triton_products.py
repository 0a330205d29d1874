"""The kernels for a GPU that read codes: by Triton's interpreter they give the reference's numbers, and they compile.

No GPU runs them: nothing is shown of speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs the extra absent_gpu")

# Triton decides when it is imported whether it interprets.
INTERPRETED = """
import json
import torch
from blockwright.blocks.kernels import coded_gpu
from blockwright.blocks.kernels.coded_attention import coded_attention_reference
from blockwright.blocks.kernels.quantise import BITS, Codes, group_sizes, quantise
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
            assert coded_gpu.suits(q, keys, values, scoring)
            right = coded_attention_reference(q.double(), keys, values, scoring)
            y = coded_gpu.triton_attention(q, keys, values, scoring)
            found[f"{bits} {T} {N} {K} {H} {S}"] = float((y - right).norm() / right.norm())
print(json.dumps(found))
"""
# Queries, heads, KV heads, width, tokens, latents of the width
CALLS = ((1, 4, 2, 33, 37, 0), (3, 5, 1, 97, 70, 80))
LONG = ((1, 8, 2, 64, 1021, 0), (2, 6, 3, 10, 145, 0), (1, 16, 1, 576, 99, 512))


def errors(calls: tuple[tuple[int, ...], ...]) -> dict[str, float]:
    script, settings = INTERPRETED.replace("CALLS", repr(calls)), {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_they_give_what_the_reference_gives() -> None:
    found = errors(CALLS)
    assert len(found) == 6 and max(found.values()) < 2e-6, found


@pytest.mark.slow
def test_so_do_long_caches_and_wide_latents() -> None:
    found = errors(LONG)
    assert len(found) == 9 and max(found.values()) < 2e-6, found


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
