"""Layers that tokens skip, hard and soft, against their formulas token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.compose import compose
from blockwright.blocks.cost import forward_flops_per_token, training_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from tests.blocks.small import decoder as small
from tests.blocks.small import ids, model, order, rewind

DEPTHS = {"name": "mixture_of_depths", "capacity": 0.4, "predictor_loss": 0.5}
T = 13
TOKENS, GIVEN = ids(T, 3), Pass(order(T), tokens=ids(T, 3))
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


def decoder_of(dtype: torch.dtype = torch.float64, residual: Any = DEPTHS, **changes: Any) -> Decoder:
    return small(dtype, residual=residual, **changes).train()


def assert_near(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(one, other, rtol=EXACT[dtype], atol=EXACT[dtype])


def branches(layer: Any, x: Tensor) -> Tensor:
    """What a layer adds to a token that takes part: y + ffn(norm(x + y)), y = attention(norm(x))."""
    y = layer.attention(layer.residual.attention_norm(x), GIVEN)
    return y + layer.ffn(layer.residual.ffn_norm(x + y), GIVEN)[0]


def slowly(decoder: Decoder, training: bool) -> tuple[Tensor, Tensor]:
    """Mixture of depths token by token, and the predictors' loss."""
    x, losses = decoder.look_up(TOKENS), []
    for layer in decoder.layers:
        residual: Any = layer.residual
        changed, rows = branches(layer, x), []
        for b in range(3):
            scores = [float((residual.router[0] @ x[b, t]).detach()) for t in range(T)]
            chosen = sorted(range(T), key=lambda t: -scores[t])[: int(0.4 * T)]
            predicted = x[b].detach() @ residual.predictor[0]
            takes = [t in chosen if training else bool(predicted[t] > 0) for t in range(T)]
            target = torch.tensor([float(t in chosen) for t in range(T)], dtype=x.dtype)
            losses.append(F.binary_cross_entropy_with_logits(predicted, target))
            each = [x[b, t] + (residual.router[0] @ x[b, t]) * changed[b, t] * takes[t] for t in range(T)]
            rows.append(torch.stack(each))
        x = torch.stack(rows)
    return decoder.norm(x), 0.5 * torch.stack(losses).mean() * len(decoder.layers)


@pytest.mark.parametrize(("training", "dtype"), [(True, torch.float64), (True, torch.float32), (False, torch.float64)])
def test_mixture_of_depths_is_its_formula(training: bool, dtype: torch.dtype) -> None:
    decoder = decoder_of(dtype).train(training)
    right, wanted = slowly(decoder, training)
    hidden, routings = decoder.hidden(TOKENS)
    assert_near(hidden, right, dtype)
    losses = [routing.losses["depth_predictor"] for routing in routings if routing is not None]
    assert len(losses) == (2 if training else 0)
    loss = hidden.sin().sum() + (torch.stack(losses).sum() if training else 0)
    slow = right.sin().sum() + (wanted if training else 0)
    for one, other, parameter in zip(
        torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True),
        torch.autograd.grad(slow, list(decoder.parameters()), allow_unused=True),
        decoder.parameters(),
        strict=True,
    ):
        zero = torch.zeros_like(parameter)
        one, other = (zero if g is None else g for g in (one, other))
        size = other.abs().max().clamp(min=1)
        assert_near(one / size, other / size, dtype)


def test_mixture_of_depths_generates_as_it_evaluates() -> None:
    """The predictor reads a token alone: a pass with caches, in parts and taken back, gives what one pass gives."""
    decoder = decoder_of().eval()
    with torch.no_grad():
        whole = decoder.hidden(TOKENS)[0]
        changed = decoder.hidden(TOKENS.index_fill(1, torch.tensor([9]), 5))[0]
        assert_near(whole[:, :9], changed[:, :9])
        caches = decoder.new_caches(3, T)
        assert_near(decoder.hidden(TOKENS[:, :6], caches=caches)[0], whole[:, :6])
        marks = [cache.mark(2) for cache in caches]
        decoder.hidden(TOKENS[:, :2], caches=caches)
        rewind(caches, marks)
        for t in range(6, T):
            assert_near(decoder.last_hidden(TOKENS[:, t : t + 1], caches)[:, 0], whole[:, t])
    assert 0 < (decoder.look_up(TOKENS) @ decoder.layers[0].residual.predictor[0] > 0).sum() < TOKENS.numel()


def test_mixture_of_depths_saves_the_flops_of_the_ffn_in_training_alone() -> None:
    whole, some = (model(residual={"name": "mixture_of_depths", "capacity": c}) for c in (1.0, 0.25))
    saved = training_flops_per_token(whole, 40) - training_flops_per_token(some, 40)
    assert saved == pytest.approx(3 * 2 * 0.75 * 6 * 48 * 24)
    assert training_flops_per_token(compose(some, device="meta").eval(), 40) == training_flops_per_token(some, 40)
    assert forward_flops_per_token(whole, 40) == forward_flops_per_token(some, 40)


def test_predictor_learns_what_the_router_chooses() -> None:
    decoder = decoder_of(n_layers=1).train()
    residual: Any = decoder.layers[0].residual
    optimizer = torch.optim.Adam([residual.predictor], lr=0.05)
    x = decoder.look_up(torch.arange(61)[None]).detach()
    for _ in range(150):
        optimizer.zero_grad()
        residual.losses(x, None)["depth_predictor"].backward()
        optimizer.step()
    chosen = torch.zeros(1, 61).scatter(1, residual.chosen(x), 1.0) > 0
    assert ((x @ residual.predictor[0] > 0) == chosen).double().mean() > 0.9


@pytest.mark.parametrize("dtype", EXACT)
def test_sigmoid_skip_is_its_formula_and_begins_as_prenorm(dtype: torch.dtype) -> None:
    decoder, plain = decoder_of(dtype, residual="sigmoid_skip"), decoder_of(dtype, residual="prenorm")
    assert_near(decoder.hidden(TOKENS)[0], plain.hidden(TOKENS)[0], dtype)
    x = decoder.look_up(TOKENS)
    with torch.no_grad():
        for layer in decoder.layers:
            residual: Any = layer.residual
            residual.weight.normal_(generator=torch.Generator().manual_seed(1))
            residual.bias.fill_(0.3)
            x = x + 2 * torch.sigmoid(x @ residual.weight.T + residual.bias) * branches(layer, x)
        assert_near(decoder.hidden(TOKENS)[0], decoder.norm(x), dtype)


@pytest.mark.parametrize("around", ["convolved", "normed_embeddings"])
def test_a_block_around_keeps_what_the_inner_one_adds_to_the_loss_and_does_to_the_stream(around: str) -> None:
    decoder = decoder_of(residual={"name": around, "residual": DEPTHS})
    losses = [routing.losses for routing in decoder.hidden(TOKENS)[1] if routing is not None]
    assert [set(each) for each in losses] == [{"depth_predictor"}] * 2
    torch.stack([each["depth_predictor"] for each in losses]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in decoder.named_parameters() if "predictor" in n)
    decoder = decoder_of(residual={"name": around, "residual": "scaled_sandwich"}, n_layers=1)
    layer: Any = decoder.layers[0]
    unscaled = layer(decoder.look_up(TOKENS), GIVEN)[0]
    layer.residual.residual.scale.fill_(3.0)
    assert_near(layer(decoder.look_up(TOKENS), GIVEN)[0], 3 * unscaled)
