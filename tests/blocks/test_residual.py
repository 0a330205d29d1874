"""Wirings of a layer against their formulas.

Those of several streams are in test_streams.py, those that tokens skip in test_skipped_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry

STREAMS = {"attention_residual", "hyper_connections", "mhc"}
SKIPPED = {"mixture_of_depths", "sigmoid_skip"}
AROUND = {"convolved", "normed_embeddings"}  # others: tests/blocks/test_convolution.py, test_skipped_layers.py
FORMULAS: dict[str, Callable[[Any, Tensor, Callable, Callable], Tensor]] = {}


def formula(f: Callable) -> Callable:
    FORMULAS[f.__name__] = f
    return f


@formula
def prenorm(r: Any, x: Tensor, attention: Callable, ffn: Callable) -> Tensor:
    x = x + attention(r.attention_norm(x))
    return x + ffn(r.ffn_norm(x))


@formula
def postnorm(r: Any, x: Tensor, attention: Callable, ffn: Callable) -> Tensor:
    h = r.attention_norm(x + attention(x))
    return r.ffn_norm(h + ffn(h))


@formula
def sandwich(r: Any, x: Tensor, attention: Callable, ffn: Callable) -> Tensor:
    h = x + r.attention_out_norm(attention(r.attention_norm(x)))
    return h + r.ffn_out_norm(ffn(r.ffn_norm(h)))


@formula
def scaled_sandwich(r: Any, x: Tensor, attention: Callable, ffn: Callable) -> Tensor:
    return sandwich(r, x, attention, ffn)  # the factor is applied by ``leave``


@formula
def parallel(r: Any, x: Tensor, attention: Callable, ffn: Callable) -> Tensor:
    return x + attention(r.attention_norm(x)) + ffn(r.attention_norm(x))


@formula
def reordered(r: Any, x: Tensor, attention: Callable, ffn: Callable) -> Tensor:
    h = x + r.attention_norm(attention(x))
    return h + r.ffn_norm(ffn(h))


@formula
def pre_postnorm(r: Any, x: Tensor, attention: Callable, ffn: Callable) -> Tensor:
    h = r.attention_sum_norm(x + attention(r.attention_norm(x)))
    return r.ffn_sum_norm(h + ffn(r.ffn_norm(h)))


@pytest.fixture
def mixers() -> tuple[Callable, Callable]:
    torch.manual_seed(0)
    a, f = (torch.randn(48, 48, dtype=torch.float64) / 7 for _ in range(2))
    return (lambda x: (x @ a).tanh().roll(1, 1)), (lambda x: (x @ f).sin())


def test_every_registered_wiring_is_tested() -> None:
    assert set(registry.names("residual")) == set(FORMULAS) | STREAMS | SKIPPED | AROUND


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("name", FORMULAS)
def test_wiring_follows_its_formula(
    make_block: Callable[..., Any], mixers: tuple[Callable, Callable], name: str, norm: str
) -> None:
    residual = make_block("residual", name, around={"norm": norm})
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(residual(x, *mixers), FORMULAS[name](residual, x, *mixers), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted({*registry.names("residual")} - AROUND))
def test_each_mixer_is_called_once(make_block: Callable[..., Any], name: str) -> None:
    calls: list[str] = []

    def mixer(called: str) -> Callable[..., Tensor]:
        return lambda x, places=None: calls.append(called) or x

    residual = make_block("residual", name)
    residual(residual.open(torch.randn(1, 3, 48, dtype=torch.float64)), mixer("attention"), mixer("ffn"))
    assert calls == ["attention", "ffn"]


@pytest.mark.parametrize("name", FORMULAS)
def test_wiring_owns_norms_of_the_models_width_and_all_of_them_learn(
    make_block: Callable[..., Any], mixers: tuple[Callable, Callable], name: str
) -> None:
    residual = make_block("residual", name, around={"norm": "layernorm"})
    assert {p.shape for p in residual.parameters()} == {(48,)}
    residual(torch.randn(2, 5, 48, dtype=torch.float64), *mixers).pow(3).sum().backward()
    assert all(p.grad.norm() > 1e-6 for p in residual.parameters())


def test_one_norm_of_a_wiring_may_differ_from_the_others(make_block: Callable[..., Any]) -> None:
    residual = make_block("residual", {"name": "prenorm", "ffn_norm": {"name": "layernorm", "bias": False}})
    assert type(residual.attention_norm).__name__ == "RMSNorm" and type(residual.ffn_norm).__name__ == "LayerNorm"
    patched = make_block("residual", {"name": "prenorm", "ffn_norm": {"eps": 0.5}})
    assert (patched.attention_norm.eps, patched.ffn_norm.eps) == (1e-6, 0.5)
