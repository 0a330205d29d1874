"""What a composition costs, against closed formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blocks.compose import compose
from blocks.cost import count_parameters, forward_flops_per_token

V, D, L = 61, 48, 2


def test_dense_models_have_no_idle_parameters(tiny: Callable[..., Any]) -> None:
    counted = count_parameters(compose(tiny()))
    attention = D * (8 + 2 * 2 + 8) * 6
    total = 2 * V * D + L * (attention + 3 * D * 40 + 2 * D) + D
    assert (counted.total, counted.active, counted.embedding) == (total, total, V * D)


@pytest.mark.parametrize(("n_experts", "top_k"), [(6, 2), (7, 3), (4, 4), (5, 1)])
def test_active_parameters_take_k_of_the_routed_experts_and_all_of_the_rest(
    tiny: Callable[..., Any], n_experts: int, top_k: int
) -> None:
    config = tiny(moe=True, n_layers=3)
    config["ffn"]["n_experts"], config["gating"]["top_k"] = n_experts, top_k
    counted = count_parameters(compose(config, device="meta"))
    one_expert = 3 * D * 12
    assert counted.total - counted.active == 2 * (n_experts - top_k) * one_expert  # two mixtures
    dense = count_parameters(compose(tiny(n_layers=3, ffn={"name": "swiglu", "d_ff": 40})))
    router, shared = D * n_experts, 3 * D * 20
    assert counted.total == dense.total + 2 * (n_experts * one_expert + router + shared - 3 * D * 40)


def test_counts_are_the_same_with_and_without_memory(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True, tie_embeddings=True)
    assert count_parameters(compose(config)) == count_parameters(compose(config, device="meta"))


def test_tied_embedding_is_counted_once(tiny: Callable[..., Any]) -> None:
    tied, untied = (count_parameters(compose(tiny(tie_embeddings=t), device="meta")) for t in (True, False))
    assert untied.total - tied.total == tied.embedding == V * D


def mha(length: int) -> int:
    """Scores and averages, uncausal: 2·2·T·N·H a token."""
    return 4 * length * D


@pytest.mark.parametrize("length", [1, 16, 63])
def test_flops_of_a_dense_model_are_twice_its_matrices_and_the_attention(tiny: Callable[..., Any], length: int) -> None:
    config = tiny(attention={"name": "mha", "n_heads": 4}, position="none")
    matrices = L * (4 * D * D + 3 * D * 40) + V * D
    assert forward_flops_per_token(config, length) == 2 * matrices + L * mha(length)


def test_flops_of_a_mixture_are_those_of_its_active_parameters(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True, attention={"name": "mha", "n_heads": 4}, position="none")
    counted = count_parameters(compose(config, device="meta"))
    norms = (2 * L + 1) * D
    matrices = counted.active - counted.embedding - norms
    assert forward_flops_per_token(config, 16) == 2 * matrices + L * mha(16)


def test_costing_allocates_no_weights(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True, d_model=2**16, vocab_size=2**20)  # a terabyte, were it made
    decoder = compose(config, device="meta")
    assert count_parameters(decoder).total > 1e11
    assert all(p.is_meta for p in decoder.parameters())
    assert sum(c.nbytes for c in decoder.new_caches(1, 1)) == L * 2 * 2 * (2**16 // 8) * 4


@torch.no_grad()
def test_kv_heads_save_cache_and_projections_but_no_attention_flops(tiny: Callable[..., Any]) -> None:
    flops = {
        k: forward_flops_per_token(tiny(attention={"name": "gqa", "n_heads": 4, "n_kv_heads": k}, position="none"), 32)
        for k in (1, 2, 4)
    }
    assert flops[4] - flops[2] == 2 * L * 2 * D * 2 * 12
    assert flops[2] - flops[1] == 2 * L * 2 * D * 1 * 12
