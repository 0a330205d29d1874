"""The decoder: embeddings, layers, norm and head put together from parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.forward_pass import Pass
from tests.blocks.small import Make, near, nothing

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"moe": True},
    "tied": {"tie_embeddings": True},
    "learned": {"position": "learned"},
    "alibi, post-norm": {"position": "alibi", "residual": "postnorm"},
    "mla, parallel": {"attention": "mla", "residual": "parallel", "norm": "layernorm"},
}


def tokens(batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_and_losses_are_those_of_the_parts_in_order_with_caches_too(
    tiny: Make, randomise: Make, changes: dict[str, Any]
) -> None:
    decoder: Any = compose(tiny(**changes)).double()
    randomise(decoder, scale=0.7)
    positions, ids = torch.arange(21)[None], tokens()
    x = decoder.position.embed(decoder.embedding.weight[ids], positions)
    for layer in decoder.layers:
        x = layer.residual(
            x, lambda h, m=layer: m.attention(h, Pass(positions)), lambda h, m=layer: m.ffn(h)[0], nothing()
        )
    logits = decoder(ids)
    assert logits.shape == (2, 21, 61)
    near(logits, decoder.norm(x) @ decoder.output_weight.t())
    near(decoder(ids, positions.expand(2, -1)), logits)
    targets = ids.roll(-1, 1)
    targets[:, -3:] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    near(decoder.nll(decoder.hidden(ids)[0], targets), expected, 0, 1e-6)
    caches = decoder.new_caches(2, 30)
    assert {b.dtype for c in caches for b in c.buffers.values()} == {torch.float64}  # as the weights are
    near(torch.cat([decoder(part, caches=caches) for part in ids.split([9, 1, 11], 1)], 1), logits, 1e-6)
    assert [c.length for c in caches] == [21, 21]


@pytest.mark.parametrize(("scaled", "position"), [(False, "rope"), (True, "learned"), (True, "rope")])
def test_embeddings_in_place_of_tokens_give_the_same(tiny: Make, scaled: bool, position: str) -> None:
    hashed = {"name": "hash", "top_k": 2}
    decoder = compose(tiny(moe=True, scale_embeddings=scaled, position=position, gating=hashed))
    embedded, positions, ids = decoder.look_up(tokens()), torch.arange(21)[None], tokens()
    right = decoder.hidden(ids)[0]
    assert torch.equal(decoder.hidden(ids, embedded=embedded)[0], right)
    assert torch.equal(decoder.position.embed(embedded, positions), decoder.embed(ids, positions))
    caches, parts = decoder.new_caches(2, 21), zip(ids.split(7, 1), embedded.split(7, 1), strict=True)
    stepped = [decoder.hidden(part, caches=caches, embedded=x)[0] for part, x in parts]
    near(torch.cat(stepped, 1), right, 1e-5, 1e-4)


def test_embeddings_may_be_of_something_else_and_get_a_gradient(tiny: Make) -> None:
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
def test_training_step_works_under_autocast(tiny: Make, residual: str, norm: str) -> None:
    nodes = {"residual": around("residual", residual, "prenorm"), "norm": around("norm", norm, "rmsnorm")}
    decoder = compose(tiny(moe=True, **nodes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, routings = decoder.hidden(tokens())
        loss = decoder.nll(hidden, tokens()) + sum(sum(r.losses.values()) for r in routings if r is not None)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in decoder.parameters())


def test_training_step_works_in_other_precisions_and_routings_are_none_where_dense(tiny: Make) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        decoder = compose(tiny(moe=True, n_layers=3)).to(dtype)
        hidden, routings = decoder.hidden(tokens())
        assert hidden.dtype == dtype and [r is None for r in routings] == [True, False, False]
        assert all(r.experts.shape == (42, 2) and "expert_balance" in r.losses for r in routings if r)
        decoder.nll(hidden, tokens()).backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in decoder.parameters())


def test_tied_head_is_the_embedding(tiny: Make) -> None:
    tied, untied = compose(tiny(tie_embeddings=True)), compose(tiny())
    assert tied.head is None and tied.output_weight is tied.embedding.weight and "head.weight" not in tied.state_dict()
    assert untied.output_weight is untied.head.weight is not untied.embedding.weight
