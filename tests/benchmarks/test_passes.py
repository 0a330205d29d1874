"""The benchmark of passes keeps one token a pass, and divides within a round."""

from __future__ import annotations

import pytest
import torch

from benchmarks import passes
from blockwright.blocks.compose import compose


@pytest.mark.parametrize("attention", passes.ATTENTIONS)
@torch.inference_mode()
def test_a_pass_keeps_one_token(attention: str) -> None:
    around = {**passes.AROUND, "d_model": 32, "n_layers": 2, "ffn": {"name": "swiglu", "d_ff": 16}}
    decoder = compose({**around, "attention": passes.ATTENTIONS[attention]}, seed=0).eval()
    caches = decoder.new_caches(1, 16)
    for n in passes.TOKENS:
        assert passes.timed(decoder, caches, n) > 0
    assert [cache.length for cache in caches] == [len(passes.TOKENS)] * 2


def test_ratios_are_of_one_round() -> None:
    rounds = [{1: 0.01, 2: 0.011, 3: 0.02}, {1: 0.03, 2: 0.033, 3: 0.06}, {1: 0.02, 2: 0.022, 3: 0.04}]
    cells = passes.row("gqa", rounds).split(" | ")
    assert cells[1:4] == ["20.0", "22.0", "40.0"]
    assert cells[4:] == ["1.10 (1.10 to 1.10)", "2.00 (2.00 to 2.00) |"]
