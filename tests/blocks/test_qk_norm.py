"""Norms of queries and keys, by themselves and inside an attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockwright import registry
from blockwright.blocks.forward_pass import Pass

CONTEXT = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 12}


def test_per_head_normalises_each_head_with_shared_gains(make_block: Callable[..., Any]) -> None:
    norm = make_block("qk_norm", "per_head", **CONTEXT)
    q, k = (torch.randn(2, 5, n, 12, dtype=torch.float64) for n in (4, 2))
    a, b = norm(q, k)
    for x, y, gain in ((q, a, norm.q_norm.weight), (k, b, norm.k_norm.weight)):
        assert gain.shape == (12,)
        torch.testing.assert_close(y, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain, rtol=0, atol=1e-12)


def test_full_normalises_the_whole_projection(make_block: Callable[..., Any]) -> None:
    norm = make_block("qk_norm", "full", **CONTEXT)
    q, k = (torch.randn(2, 5, n, 12, dtype=torch.float64) for n in (4, 2))
    a, b = norm(q, k)
    for x, y, gain in ((q, a, norm.q_norm.weight), (k, b, norm.k_norm.weight)):
        flat = x.flatten(-2)
        expected = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        torch.testing.assert_close(y.flatten(-2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa", "sliding_window"])
@pytest.mark.parametrize("name", registry.names("qk_norm"))
def test_attention_tells_its_norm_how_many_heads_there_are(
    make_block: Callable[..., Any], attention: str, name: str
) -> None:
    block = make_block("attention", {"name": attention, "n_heads": 4, "qk_norm": name})
    kv_heads = {"mha": 4, "mqa": 1}.get(attention, 2)
    widths = {"per_head": (12, 12), "full": (48, 12 * kv_heads)}[name]
    assert (len(block.qk_norm.q_norm.weight), len(block.qk_norm.k_norm.weight)) == widths
    torch.manual_seed(0)
    x, positions = torch.randn(2, 7, 48, dtype=torch.float64), torch.arange(7)[None]
    y = block(x, Pass(positions))
    block.query.weight.data *= 100
    block.key.weight.data *= 100
    torch.testing.assert_close(block(x, Pass(positions)), y, rtol=0, atol=1e-4)  # but for eps
