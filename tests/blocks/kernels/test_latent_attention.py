"""Absorbed attention computes what expanding computes, and is chosen when it is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each, pairs
from torch import Tensor

from blockwright.blocks.attention.mla import MLA
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import attention as module
from blockwright.blocks.kernels.attention import (
    absorbs,
    causal_attention_reference,
    into_latents,
    key_multiple,
    out_of_latents,
)
from blockwright.blocks.kernels.products import Choice, use
from blockwright.blocks.kernels.scoring import Scoring
from tests.blocks.kernels.compared import drawn

B, N, NOPE, ROPE, VALUE, C = 2, 3, 7, 4, 5, 11
SCALE = 0.37
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.06}


def both_ways(T: int, S: int, extra: int, dtype: torch.dtype, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B,T,N,V] absorbed, and expanded by the definition."""
    q_nope, q_rope = drawn(B, T, N, NOPE, dtype=dtype), drawn(B, T, N, ROPE, dtype=dtype, seed=1)
    memory = drawn(B, S + extra, C + ROPE, dtype=dtype, seed=2)
    up = drawn(N, NOPE + VALUE, C, dtype=dtype, seed=3) / C**0.5
    key_up, value_up = up.split((NOPE, VALUE), 1)
    q = torch.cat((into_latents(q_nope, key_up), q_rope), -1)
    absorbed = out_of_latents(module.latent_attention(q, memory, S, C, scale=SCALE, bias=bias), value_up)
    latent, k_rope = memory[:, :S].split((C, ROPE), -1)
    k_nope, v = torch.einsum("bsc,nic->bsni", latent, up).split((NOPE, VALUE), -1)
    k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, N, -1)), -1)
    expanded = causal_attention_reference(torch.cat((q_nope, q_rope), -1), k, v, Scoring(SCALE, bias))
    return absorbed, expanded


@pytest.fixture(params=[module.LARGE, 0], ids=["batch", "row by row"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to go over a batch."""
    monkeypatch.setattr(module, "LARGE", request.param)


@pytest.mark.usefixtures("large")
def test_absorbed_equals_expanded() -> None:
    sizes = [(1, 1), (1, 63), (5, 5), (7, 63), (module.FEW // N + 1, 63)]
    for (T, S), extra, (dtype, bound) in pairs(sizes, [0, 5], list(BOUNDS.items())):
        absorbed, expanded = both_ways(T, S, extra, dtype, None)
        assert absorbed.dtype == dtype
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=bound)
    for shape in ((1, N), (B, 1), (B, N)):
        absorbed, expanded = both_ways(4, 9, 3, torch.float64, drawn(*shape, 4, 9, seed=7))
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-12)


def test_parts_of_a_long_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Choice(cached=True))
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "PART", 16)
    for S, biased in each([64, 63, 17], [False, True, True]):
        bias = drawn(B, N, 1, S, dtype=torch.float32, seed=7) if biased else None
        with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
            absorbed, expanded = both_ways(1, S, 64 - S, torch.float32, bias)
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-5)
        products = [e.input_shapes for e in profile.events() if e.name == "aten::bmm"]
        assert [[4, 16, C + ROPE], [4, C + ROPE, N]] in products and [[4, N, 16], [4, 16, C]] in products


@pytest.mark.usefixtures("large")
def test_latents_are_not_copied() -> None:
    memory, q = drawn(1, 300, C + ROPE), drawn(1, 1, N, C + ROPE)
    with torch.profiler.profile(profile_memory=True) as profile:
        module.latent_attention(q, memory, 200, C, scale=1.0)
    taken = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert taken < memory.nbytes / 1.5  # scores and weights, of 3 numbers a token where the latent has 15


# --- the choice -------------------------------------------------------------------------------------------------------

DEEPSEEK = {"latent": 512, "rope": 64, "nope": 128, "value": 128}


def test_decoding_absorbs_and_prefill_expands_by_multiplications_and_never_holds_more_scores() -> None:
    absorbed, expanded = [(1, 2), (1, 100_000), (16, 8192)], [(4096, 4096), (128, 128), (256, 100_000)]
    assert all(absorbs(*size, **DEEPSEEK) for size in absorbed)
    assert not any(absorbs(*size, **DEEPSEEK) for size in expanded)
    for S in (200, 1000, 10_000):
        for T in range(1, 200):
            cheaper = T * 512 * 256 + T * S * 1088 < S * 512 * 256 + T * S * 320
            assert absorbs(T, S, **DEEPSEEK) == cheaper
    assert absorbs(8, 1000, 2, 2, 4, 4) and not absorbs(9, 1000, 2, 2, 4, 4)  # than there would be keys and values


YARN = {"name": "yarn", "factor": 8.0, "original_positions": 16}


@torch.no_grad()
@pytest.mark.parametrize(
    ("position", "dtype", "bound"),
    each(["rope", "alibi", YARN], list(BOUNDS), [1e-10, 1e-5, 0.1]),
    ids=str,
)
def test_mla_gives_the_same_both_ways(
    make_block: Callable[..., Any], position: Any, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"name": "mla", "n_heads": 3, "kv_lora_rank": 11, "qk_rope_head_dim": 4, "v_head_dim": 5}
    node["qk_nope_head_dim"] = 7
    attention: MLA = make_block("attention", node, dtype=dtype, around={"position": position})
    x, where, outputs = drawn(2, 21, 48, dtype=dtype), torch.arange(21)[None], []
    for choice in (True, False):
        monkeypatch.setattr(module, "absorbs", lambda *a, choice=choice: choice)
        cache = attention.new_cache(2, 21, dtype, torch.device("cpu"))
        parts = zip(x.split([9, 1, 1, 10], 1), where.split([9, 1, 1, 10], 1), strict=True)
        outputs.append(torch.cat([attention(part, Pass(positions, cache=cache)) for part, positions in parts], 1))
    torch.testing.assert_close(*outputs, rtol=0, atol=bound)
    torch.testing.assert_close(outputs[0], attention(x, Pass(where)), rtol=0, atol=bound)


def test_keys_are_rounded_where_every_new_shape_is_compiled() -> None:
    cpu, elsewhere = torch.device("cpu"), torch.device("cuda", 0)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, single in (("highest", 1), ("medium", 256)):
            torch.set_float32_matmul_precision(precision)
            found = [key_multiple(d, cpu) for d in (torch.float64, torch.float32, torch.bfloat16)]
            assert found == [1, single, 256] and key_multiple(torch.bfloat16, elsewhere) == 1
    finally:
        torch.set_float32_matmul_precision(before)
