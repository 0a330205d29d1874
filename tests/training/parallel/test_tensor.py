"""Tensor parallelism splits what it can, an attention with a selector too, and leaves the rest whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_ranks import ALIBI, DEEPSEEK, DENSE, GPT, read_model, spawn
from torch.distributed.device_mesh import init_device_mesh

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.training.parallel.local import regions
from blockwright.training.parallel.splits import cut, divisible

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


ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "mla": {"name": "mla", "n_heads": 4, "q_lora_rank": 12},
}
SELECTORS = [
    {"name": "dsa", "n_heads": 4, "head_dim": 8, "top_k": 7},
    {"name": "pooled", "n_heads": 4, "head_dim": 8, "block_size": 3, "top_k": 2},
    {"name": "block", "block_size": 4, "top_k": 2},
]


def model(attention: dict[str, Any]) -> Decoder:
    around = {"position": "rope", "ffn": {"name": "swiglu", "d_ff": 24}, "norm": "rmsnorm", "residual": "prenorm"}
    sizes = {"vocab_size": 40, "d_model": 32, "n_layers": 2, "max_positions": 64, "init": {"std": 0.1}}
    return compose({**sizes, **around, "attention": attention}, seed=1).train()


def trained(decoder: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and gradients of the selectors."""
    hidden, routings = decoder.hidden(torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0)))
    losses = [loss for routing in routings if routing is not None for loss in routing.losses.values()]
    torch.stack([hidden.square().mean(), *losses]).sum().backward()
    grads = {n: p.grad for n, p in decoder.named_parameters() if "selector" in n and p.grad is not None}
    return hidden.detach(), grads


def compared() -> dict[tuple[str, str], float]:
    """The greatest relative difference between split and whole models."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, attention in ATTENTIONS.items():
        for selector in SELECTORS:
            whole, split = (model({**attention, "selector": selector}) for _ in range(2))
            for region in regions(split):
                cut(region, mesh)
            (expected, right), (hidden, parts) = trained(whole), trained(split)
            far = [float((hidden - expected).abs().max())]
            assert parts.keys() == right.keys()
            for parameter, grad in parts.items():
                total = (grad.to_local() if hasattr(grad, "to_local") else grad).clone()
                dist.all_reduce(total)  # replicated in a region: each rank has a part
                far.append(float((total - right[parameter]).abs().max() / right[parameter].abs().max()))
            found[name, selector["name"]] = max(far)
    return found


@pytest.mark.slow
def test_split_heads_choose_and_learn_as_whole_ones() -> None:
    for case, far in spawn(2, compared)[0].items():
        assert far < 1e-5, (case, far)
