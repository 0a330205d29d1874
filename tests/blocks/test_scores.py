"""What takes the place of a plain softmax, inside an attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.registry import ConfigError

NODES = [{"name": "softcap", "cap": 2.0}, {"name": "sinks"}]


@pytest.mark.parametrize("scores", NODES, ids=lambda n: n["name"])
@pytest.mark.parametrize("attention", ["gqa", "sliding_window"])
def test_attention_uses_it_with_its_own_scale_and_window(
    make_block: Callable[..., Any], attention: str, scores: dict[str, Any]
) -> None:
    window = {"window": 3} if attention == "sliding_window" else {}
    node = {"name": attention, "n_heads": 4, "scores": scores, "query_scale": 5.0, **window}
    block = make_block("attention", node)
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 12)) for p in (block.query, block.key, block.value))
    extra = {"softcap": 2.0} if scores["name"] == "softcap" else {"sinks": block.scores.sinks}
    y = causal_attention_reference(q, k, v, Scoring(5.0**-0.5, **window, **extra))
    torch.testing.assert_close(block(x, Pass(torch.arange(9)[None])), block.output(y.flatten(-2)), rtol=0, atol=1e-6)
    plain = causal_attention_reference(q, k, v, Scoring(5.0**-0.5, **window))
    assert (y - plain).abs().max() > 1e-3


def test_cap_must_be_above_zero(make_block: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_block("scores", {"name": "softcap", "cap": 0.0}, n_heads=4)
    assert caught.value.path == "model.scores.cap"
