"""Norms of queries and keys, by themselves and inside an attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockwright import registry
from blockwright.blocks.forward_pass import Pass

CONTEXT = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 12}


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
