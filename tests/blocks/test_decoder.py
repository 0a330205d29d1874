"""The decoder: embeddings, layers, norm and head put together from parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.layer import Layer
from blockwright.blocks.mtp import MTP

CONFIGS = {
    "dense": {},
    "moe": {"moe": True},
    "tied": {"tie_embeddings": True},
    "learned": {"position": "learned"},
    "alibi, post-norm": {"position": "alibi", "residual": "postnorm"},
    "mla, parallel": {"attention": "mla", "residual": "parallel", "norm": "layernorm"},
}


def test_layers_are_given_one_value_beside_the_states() -> None:
    assert list(inspect.signature(Layer.forward).parameters) == ["self", "x", "given", "ends"]
    assert list(inspect.signature(MTP.forward).parameters) == ["self", "embedded", "hidden", "given"]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def decoder(request: pytest.FixtureRequest, tiny: Callable[..., Any], randomise: Callable[..., None]) -> Decoder:
    made = compose(tiny(**request.param)).double()
    randomise(made, scale=0.7)
    return made


def tokens(batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_those_of_the_parts_in_order(decoder: Decoder) -> None:
    positions = torch.arange(21)[None]
    x = decoder.position.embed(decoder.embedding.weight[tokens()], positions)
    for layer in decoder.layers:
        x = layer.residual(x, lambda h, m=layer: m.attention(h, Pass(positions)), lambda h, m=layer: m.ffn(h)[0])
    expected = decoder.norm(x) @ decoder.output_weight.t()
    logits = decoder(tokens())
    assert logits.shape == (2, 21, 61)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_positions_count_from_zero_unless_told_otherwise(decoder: Decoder) -> None:
    plain = decoder(tokens())
    torch.testing.assert_close(decoder(tokens(), torch.arange(21)[None]), plain, rtol=0, atol=0)
    torch.testing.assert_close(decoder(tokens(), torch.arange(21)[None].expand(2, -1)), plain, rtol=0, atol=1e-12)


@torch.no_grad()
def test_caches_continue_where_they_stand(decoder: Decoder) -> None:
    caches = decoder.new_caches(2, 30)
    parts = [decoder(part, caches=caches) for part in tokens().split([9, 1, 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), decoder(tokens()), rtol=0, atol=1e-6)
    assert [c.length for c in caches] == [21, 21]


def test_caches_are_as_the_weights_are(decoder: Decoder) -> None:
    assert {b.dtype for c in decoder.new_caches(1, 2) for b in c.buffers.values()} == {torch.float64}
    caches = decoder.to(torch.bfloat16).new_caches(1, 2)
    assert {b.dtype for c in caches for b in c.buffers.values()} == {torch.bfloat16} and len(caches) == 2


def test_nll_is_the_cross_entropy_of_the_logits(decoder: Decoder) -> None:
    hidden, _ = decoder.hidden(tokens())
    targets = tokens().roll(-1, 1)
    targets[:, -3:] = -100
    expected = F.cross_entropy(decoder(tokens()).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(decoder.nll(hidden, targets), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_embeddings_in_place_of_tokens_give_the_same(tiny: Callable[..., Any], scaled: bool, position: str) -> None:
    decoder = compose(tiny(moe=True, scale_embeddings=scaled, position=position, gating={"name": "hash", "top_k": 2}))
    embedded, positions = decoder.look_up(tokens()), torch.arange(21)[None]
    assert torch.equal(decoder.hidden(tokens(), embedded=embedded)[0], decoder.hidden(tokens())[0])
    assert torch.equal(decoder.position.embed(embedded, positions), decoder.embed(tokens(), positions))
    caches = decoder.new_caches(2, 21)
    parts = zip(tokens().split(7, 1), embedded.split(7, 1), strict=True)
    stepped = [decoder.hidden(part, caches=caches, embedded=x)[0] for part, x in parts]
    torch.testing.assert_close(torch.cat(stepped, 1), decoder.hidden(tokens())[0], rtol=1e-4, atol=1e-5)


def test_embeddings_may_be_of_something_else_and_get_a_gradient(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny())
    patches = decoder.look_up(tokens()).detach()
    patches[:, :4] += 1.0
    patches.requires_grad_()
    hidden, _ = decoder.hidden(tokens(), embedded=patches)
    assert not torch.equal(hidden, decoder.hidden(tokens())[0])
    hidden.sum().backward()
    assert patches.grad is not None and patches.grad[:, :4].abs().sum() > 0 and decoder.embedding.weight.grad is None


def around(kind: str, name: str, inner: str) -> dict[str, Any]:
    """The node of a block; one that takes a block of its own kind is around ``inner``."""
    children = registry.lookup(kind, name).schema.children.values()
    return {"name": name, **{p.name: inner for p in children if p.child == kind and not p.optional}}


@pytest.mark.parametrize(("residual", "norm"), each(registry.names("residual"), registry.names("norm")))
def test_training_step_works_under_autocast(tiny: Callable[..., Any], residual: str, norm: str) -> None:
    nodes = {"residual": around("residual", residual, "prenorm"), "norm": around("norm", norm, "rmsnorm")}
    decoder = compose(tiny(moe=True, **nodes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, routings = decoder.hidden(tokens())
        loss = decoder.nll(hidden, tokens()) + sum(sum(r.losses.values()) for r in routings if r is not None)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_training_step_works_in_other_precisions(tiny: Callable[..., Any], dtype: torch.dtype) -> None:
    decoder = compose(tiny(moe=True)).to(dtype)
    hidden, _ = decoder.hidden(tokens())
    assert hidden.dtype == dtype
    decoder.nll(hidden, tokens()).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in decoder.parameters())


def test_tied_head_is_the_embedding(tiny: Callable[..., Any]) -> None:
    tied, untied = compose(tiny(tie_embeddings=True)), compose(tiny())
    assert tied.head is None and tied.output_weight is tied.embedding.weight
    assert untied.output_weight is untied.head.weight is not untied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 61 * 48
    assert "head.weight" not in tied.state_dict()


def test_routings_come_layer_by_layer_and_are_none_where_dense(tiny: Callable[..., Any]) -> None:
    _, routings = compose(tiny(moe=True, n_layers=3)).hidden(tokens())
    assert [r is None for r in routings] == [True, False, False]
    assert all(r.experts.shape == (42, 2) and "expert_balance" in r.losses for r in routings if r)
