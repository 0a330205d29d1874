"""Norms against their formulas, torch's own and transformers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from blockwright import registry
from blockwright.blocks.norm.base import Norm


@pytest.fixture(scope="module")
def make(make_block: Callable[..., Any]) -> Callable[..., Norm]:
    return lambda node, dtype=torch.float64: make_block("norm", node, dim=45, dtype=dtype)


def activations() -> torch.Tensor:
    torch.manual_seed(0)
    return 3 + 2 * torch.randn(2, 7, 45, dtype=torch.float64)


@pytest.mark.parametrize(("name", "torchs"), [("rmsnorm", nn.RMSNorm(45, eps=1e-6)), ("layernorm", nn.LayerNorm(45))])
def test_norm_equals_torchs_own(make: Callable[..., Norm], name: str, torchs: nn.Module) -> None:
    norm, theirs = make(name), torchs.double()
    theirs.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(activations()), theirs(activations()), rtol=0, atol=1e-14)


def test_rmsnorm_equals_transformers_llama(make: Callable[..., Norm]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = activations().float()
    norm, theirs = make("rmsnorm", torch.float32), LlamaRMSNorm(45, eps=1e-6)
    theirs.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), theirs(x), rtol=0, atol=1e-6)
    half = norm.bfloat16()(x.bfloat16()).float()  # rounds once where transformers rounds twice
    torch.testing.assert_close(half, theirs.bfloat16()(x.bfloat16()).float(), rtol=2**-7, atol=0)


def test_rmsnorm_takes_the_mean_in_single_precision(make: Callable[..., Norm]) -> None:
    norm, x = make("rmsnorm", torch.bfloat16), activations().bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("name", registry.names("norm"))
def test_silence_stays_silence(make: Callable[..., Norm], name: str) -> None:
    norm = make(name)
    y = norm(torch.zeros(1, 45, dtype=torch.float64))
    assert y.isfinite().all() and torch.equal(
        y[0], getattr(norm, "bias", None) if name in ("layernorm", "dynamic_tanh") else y[0] * 0
    )


@pytest.mark.filterwarnings("error")  # torch warns when it must leave the fused path
def test_rmsnorm_gives_half_for_half_though_its_gain_is_single(make: Callable[..., Norm]) -> None:
    norm, x = make("rmsnorm", torch.float32), activations().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x.float()), rtol=2**-7, atol=0)


def test_rmsnorm1p_rounds_once_as_transformers_gemma_does(make: Callable[..., Norm]) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    norm, x = make("rmsnorm1p", torch.bfloat16), activations().bfloat16()
    theirs = Gemma2RMSNorm(45, eps=1e-6).to(torch.bfloat16)
    theirs.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), theirs(x))
