"""What a node generates: caches at the width asked for, states of recurrent mixers at their own."""

from __future__ import annotations

import pytest
import torch

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import cache_bytes
from blockwright.plugins.planner.generation import generation
from blockwright.plugins.planner.hardware import coefficients, hardware


@pytest.mark.parametrize("name", ["kimi_linear_48b_a3b", "llama3_1_8b"])
def test_caches_take_the_bytes_that_they_take(name: str) -> None:
    decoder = compose(preset(name), device="meta")
    found = generation(decoder, hardware("h800"), coefficients(), context=512)
    assert found.caches / found.batch == cache_bytes(decoder, 512, torch.bfloat16)


def test_states_do_not_shrink_with_the_numbers_of_caches() -> None:
    decoder = compose(preset("kimi_linear_48b_a3b"), device="meta")
    whole, quarter = (
        generation(decoder, hardware("h800"), coefficients(), context=512, cache_bits=bits) for bits in (16, 4)
    )
    grown = cache_bytes(decoder, 512, torch.bfloat16) - cache_bytes(decoder, 256, torch.bfloat16)
    shrunk = whole.caches / whole.batch - quarter.caches / quarter.batch
    assert grown > 0 and shrunk == pytest.approx(2 * grown * 12 / 16, rel=0.05)
