"""Norms in other precisions, and against transformers' code; their formulas are in test_formulas.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blockwright import registry
from tests.blocks.small import Make, drawn, near

X = 3 + 2 * drawn(2, 7, 45)


@pytest.fixture
def make(make_block: Make) -> Make:
    return lambda node, dtype=torch.float64: make_block("norm", node, dim=45, dtype=dtype)


def test_rmsnorms_equal_those_of_transformers(make: Make) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, llama = make("rmsnorm", torch.float32), LlamaRMSNorm(45, eps=1e-6)
    llama.load_state_dict(norm.state_dict())
    near(norm(X.float()), llama(X.float()), 1e-6)
    half = norm.bfloat16()(X.bfloat16()).float()  # rounds once where transformers rounds twice
    near(half, llama.bfloat16()(X.bfloat16()).float(), 0, 2**-7)
    plus_one, gemma = make("rmsnorm1p", torch.bfloat16), Gemma2RMSNorm(45, eps=1e-6).to(torch.bfloat16)
    gemma.load_state_dict(plus_one.state_dict())
    assert torch.equal(plus_one(X.bfloat16()), gemma(X.bfloat16()))


@pytest.mark.filterwarnings("error")  # torch warns when it must leave the fused path
def test_rmsnorm_takes_the_mean_in_single_precision_and_gives_half_for_half(make: Make) -> None:
    norm, x = make("rmsnorm", torch.bfloat16), X.bfloat16().double()
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    near(norm(X.bfloat16()).double(), exact, 1e-9, 2**-8)
    single = make("rmsnorm", torch.float32)  # its gain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = single(X.bfloat16())
    assert y.dtype == torch.bfloat16
    near(y.float(), single(X.bfloat16().float()), 0, 2**-7)


def test_silence_stays_silence(make: Make) -> None:
    for name in registry.names("norm"):
        norm: Any = make(name)
        y = norm(torch.zeros(1, 45, dtype=torch.float64))
        right = norm.bias if name in ("layernorm", "dynamic_tanh") else torch.zeros(45, dtype=torch.float64)
        assert torch.equal(y[0], right), name
