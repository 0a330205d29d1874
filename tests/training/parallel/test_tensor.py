"""Tensor parallelism splits what it can: a block whose plan is wrong stays whole, and would train as well."""

from __future__ import annotations

import pytest
from many_ranks import ALIBI, DEEPSEEK, DENSE, GPT, read_model

from blockwright.blocks.compose import compose
from blockwright.training.parallel.plan import regions
from blockwright.training.parallel.tensor import divisible

SPLIT = {
    DENSE: {"layers.0.attention": True, "layers.0.ffn": True},
    GPT: {"layers.0.attention": True, "layers.0.ffn": True},
    DEEPSEEK: {"layers.0.attention": True, "layers.0.ffn": True, "layers.1.ffn.shared": True},
    ALIBI: {"layers.0.attention": False, "layers.0.ffn": True},
}


@pytest.mark.parametrize("model", SPLIT, ids=["dense", "gpt", "deepseek", "alibi"])
def test_two_ranks_split_every_block_that_works_with_half_of_it(model: str) -> None:
    decoder = compose(read_model(model), device="meta")
    split = {region.name: divisible(region, 2, 32) for region in regions(decoder, routed=False)}
    assert {name: split.get(name) for name in SPLIT[model]} == SPLIT[model], split
