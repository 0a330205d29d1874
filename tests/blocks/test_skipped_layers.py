"""Layers that tokens skip, hard and soft, against their formulas token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.compose import check, compose
from blockwright.blocks.cost import forward_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 36,
    "n_layers": 2,
    "max_positions": 64,
    "attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 3},
    "position": "rope",
    "ffn": {"name": "swiglu", "d_ff": 23},
    "norm": "rmsnorm",
    "residual": {"name": "mixture_of_depths", "capacity": 0.4, "predictor_loss": 0.5},
    "init": {"std": 0.2, "depth_scaled": False},
}
T = 13
TOKENS = torch.randint(61, (3, T), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(T)[None]
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


def decoder_of(dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    return compose({**MODEL, **changes}).to(dtype)


def assert_near(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(one, other, rtol=EXACT[dtype], atol=EXACT[dtype])


def branches(layer: Any, x: Tensor) -> Tensor:
    """What a layer adds to a token that takes part: y + ffn(norm(x + y)), y = attention(norm(x))."""
    given = Pass(POSITIONS, tokens=TOKENS)
    y = layer.attention(layer.residual.attention_norm(x), given)
    return y + layer.ffn(layer.residual.ffn_norm(x + y), given)[0]


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


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("training", [True, False])
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
        for cache, mark in zip(caches, marks, strict=True):
            cache.rewind(mark)
        for t in range(6, T):
            assert_near(decoder.last_hidden(TOKENS[:, t : t + 1], caches)[:, 0], whole[:, t])
    taken = (
        decoder.layers[0].residual._scores(decoder.look_up(TOKENS), decoder.layers[0].residual.predictor) > 0
    ).sum()  # type: ignore[union-attr, operator]
    assert 0 < taken < TOKENS.numel()


def test_mixture_of_depths_saves_the_flops_of_the_ffn() -> None:
    flops = {
        c: forward_flops_per_token({**MODEL, "residual": {"name": "mixture_of_depths", "capacity": c}}, 40)
        for c in (1.0, 0.25)
    }
    assert flops[1.0] - flops[0.25] == pytest.approx(2 * 0.75 * 6 * 36 * 23)


def test_predictor_learns_what_the_router_chooses() -> None:
    decoder = decoder_of(n_layers=1).train()
    residual: Any = decoder.layers[0].residual
    optimizer = torch.optim.Adam([residual.predictor], lr=0.05)
    x = decoder.look_up(torch.arange(61)[None]).detach()
    for _ in range(300):
        optimizer.zero_grad()
        residual.losses(x, None)["depth_predictor"].backward()
        optimizer.step()
    chosen = torch.zeros(1, 61).scatter(1, residual.chosen(x), 1.0) > 0
    agree = ((residual._scores(x, residual.predictor) > 0) == chosen).double().mean()
    assert agree > 0.9


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


@pytest.mark.parametrize(
    ("residual", "path"),
    [
        ({"name": "mixture_of_depths", "capacity": 0}, "model.residual.capacity"),
        ({"name": "mixture_of_depths", "capacity": 1.5}, "model.residual.capacity"),
        ({"name": "mixture_of_depths", "predictor_loss": -1}, "model.residual.predictor_loss"),
        ({"name": "sigmoid_skip", "capacity": 0.5}, "model.residual.capacity"),
    ],
)
def test_skips_that_cannot_be_are_refused(residual: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check({**MODEL, "residual": residual})
    assert refusal.value.path == path


@pytest.mark.parametrize("around", ["convolved", "normed_embeddings"])
def test_a_block_around_keeps_what_the_inner_one_adds_to_the_loss(around: str) -> None:
    decoder = decoder_of(residual={"name": around, "residual": MODEL["residual"]}).train()
    routings = decoder.hidden(TOKENS)[1]
    assert [set(routing.losses) for routing in routings if routing is not None] == [{"depth_predictor"}] * 2


@pytest.mark.parametrize("around", ["convolved", "normed_embeddings"])
def test_a_block_around_keeps_what_the_inner_one_does_to_the_stream(around: str) -> None:
    decoder = decoder_of(residual={"name": around, "residual": "scaled_sandwich"}, n_layers=1)
    layer: Any = decoder.layers[0]
    x, given = decoder.look_up(TOKENS), Pass(POSITIONS, tokens=TOKENS)
    unscaled = layer(x, given)[0]
    layer.residual.residual.scale.fill_(3.0)
    assert_near(layer(x, given)[0], 3 * unscaled)


CONVOLVED = {"name": "convolved", "residual": MODEL["residual"]}
SHORTCUT = {"name": "shortcut", "later": {"name": "swiglu", "d_ff": 23}}


@pytest.mark.parametrize(
    ("changes", "path", "rule"),
    [
        ({"ffn": {**MODEL["ffn"], "gate_conv": "canon"}}, "model.ffn", "needs all tokens (Canon)"),
        ({"ffn": SHORTCUT}, "model.ffn", "needs all tokens (Shortcut)"),
        ({"ffn": {"name": "scaled", "ffn": SHORTCUT}}, "model.ffn", "needs all tokens (Shortcut)"),
        ({"residual": {**CONVOLVED, "ffn_conv": "canon"}}, "model.residual.ffn_conv", "needs tokens side"),
        ({"residual": {**CONVOLVED, "ffn_out_conv": "silu"}}, "model.residual.ffn_out_conv", "needs tokens side"),
    ],
)
def test_what_needs_all_tokens_is_refused_where_some_are_chosen(changes: dict, path: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check({**MODEL, **changes})
    assert caught.value.path == path and rule in caught.value.rule


@pytest.mark.parametrize("around", ["convolved", "normed_embeddings"])
def test_predictors_inside_another_residual_block_learn(around: str) -> None:
    decoder = decoder_of(residual={"name": around, "residual": MODEL["residual"]}).train()
    _, routings = decoder.hidden(TOKENS)
    losses = [routing.losses["depth_predictor"] for routing in routings if routing is not None]
    torch.stack(losses).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in decoder.named_parameters() if "predictor" in n)
