"""Wirings of a layer against their formulas.

Those of several streams are in test_streams.py, those that tokens skip in test_skipped_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright import registry
from tests.blocks.small import Make, drawn, near, nothing

STREAMS = {"attention_residual", "gated_streams", "hyper_connections", "mhc", "read_ahead"}
SKIPPED = {"mixture_of_depths", "sigmoid_skip"}
AROUND = {"convolved", "normed_embeddings"}  # others: test_convolution.py, test_skipped_layers.py
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


FORMULAS["scaled_sandwich"] = FORMULAS["sandwich"]  # its factor is in ``leave``: test_skipped_layers.py


@pytest.fixture
def mixers() -> tuple[Callable, Callable]:
    torch.manual_seed(0)
    a, f = (torch.randn(48, 48, dtype=torch.float64) / 7 for _ in range(2))
    return (lambda x: (x @ a).tanh().roll(1, 1)), (lambda x: (x @ f).sin())


def test_every_registered_wiring_is_tested() -> None:
    assert set(registry.names("residual")) == set(FORMULAS) | STREAMS | SKIPPED | AROUND


@pytest.mark.parametrize(("name", "norm"), each(list(FORMULAS), ["rmsnorm", "layernorm"]))
def test_wiring_follows_its_formula(make_block: Make, mixers: tuple[Callable, Callable], name: str, norm: str) -> None:
    residual, x = make_block("residual", name, around={"norm": norm}), drawn(2, 5, 48)
    near(residual(x, *mixers, nothing()), FORMULAS[name](residual, x, *mixers))
    assert {p.shape for p in residual.parameters()} == {(48,)}
    residual(x, *mixers, nothing()).pow(3).sum().backward()
    assert all(p.grad.norm() > 1e-6 for p in residual.parameters())


def test_each_mixer_is_called_once(make_block: Make) -> None:
    for name in {*registry.names("residual")} - AROUND:
        calls: list[str] = []

        def mixer(called: str, calls: list[str] = calls) -> Callable[..., Tensor]:
            return lambda x, places=None: calls.append(called) or x

        residual = make_block("residual", name)
        residual(residual.open(drawn(1, 3, 48)), mixer("attention"), mixer("ffn"), nothing())
        assert calls == ["attention", "ffn"], name


def test_a_scaled_sandwich_multiplies_the_whole_stream_when_a_layer_is_left(make_block: Make) -> None:
    residual, x = make_block("residual", "scaled_sandwich"), drawn(2, 5, 48)
    residual.scale.fill_(0.25)
    assert torch.equal(residual.leave(x), x / 4)


def test_normed_embeddings_norm_the_input_of_the_first_layer_alone(make_block: Make) -> None:
    node, x = {"name": "normed_embeddings", "residual": "prenorm"}, drawn(2, 5, 48)
    first, second = (make_block("residual", node, layer_idx=index) for index in range(2))
    near(first.open(x), x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * first.norm.weight)
    assert second.open(x) is x and second.norm is None
