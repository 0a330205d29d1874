"""What crosses depth: opened and closed streams, and what blocks of one layer leave for those of later layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.attention.grouped import GQA
from blockwright.blocks.attention.recurrent import _by_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass, joined, split
from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer
from blockwright.blocks.residual.norms import PreNorm
from blockwright.registry import register
from blockwright.training.parallel.recompute import recompute
from tests.blocks.small import decoder, drawn, ids, in_parts, order

TOKENS = ids(9)


@pytest.fixture(autouse=True)
def blocks(blocks_of_the_module: None) -> Iterator[None]:
    @register("attention", "summing")
    class Summing(GQA):
        """Adds the inputs of the attentions below."""

        def forward(self, x: Tensor, given: Pass) -> Tensor:
            carry = {} if given.carry is None else given.carry
            carry["sum"] = x + carry.get("sum", 0)
            return super().forward(carry["sum"].tanh(), given)

    @register("residual", "doubled")
    class Doubled(PreNorm):
        """Two streams: the negative of the first, and the first."""

        streams = 2

        def __init__(self, attention_norm: Norm, ffn_norm: Norm) -> None:
            super().__init__(attention_norm, ffn_norm)

        def open(self, x: Tensor) -> Tensor:
            return torch.stack((-x, x), 2)

        def close(self, x: Tensor, given: Pass) -> Tensor:
            return x[:, :, 1] - x[:, :, 0]

        def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
            return self.open(super().forward(x[:, :, 1], attention, ffn, given))

    yield


def carrying(residual: str = "doubled", **more: Any) -> Decoder:
    attention = {"name": "summing", "n_heads": 4, "n_kv_heads": 2}
    return decoder(torch.float32, n_layers=3, attention=attention, residual=residual, **more)


def test_layers_read_what_those_below_left() -> None:
    made, seen, read = carrying(), list[Tensor](), list[Tensor]()
    for layer in made.layers:
        layer.attention.query.register_forward_pre_hook(lambda module, given: read.append(given[0]))
        layer.residual.attention_norm.register_forward_hook(lambda module, given, y: seen.append(y))
    with torch.no_grad():
        made(TOKENS)
    for depth in range(3):
        torch.testing.assert_close(read[depth], torch.stack(seen[: depth + 1]).sum(0).tanh())


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_layers_have_the_same_gradients(how: Any) -> None:
    made = carrying()
    other = copy.deepcopy(made)
    recompute(other, how)
    losses = [m.nll(m.hidden(TOKENS[:, :-1])[0], TOKENS[:, 1:]) for m in (made, other)]
    grads = [torch.autograd.grad(y, list(m.parameters())) for y, m in zip(losses, (made, other), strict=True)]
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_streams_are_opened_and_closed_once_in_steps_too() -> None:
    made = carrying()
    torch.testing.assert_close(in_parts(made, TOKENS, [2, 2, 2, 2, 1]), made.hidden(TOKENS)[0], rtol=0, atol=1e-5)
    # The closed streams are twice the one stream, and the norm divides by it.
    torch.testing.assert_close(made(TOKENS), carrying("prenorm")(TOKENS), rtol=0, atol=1e-4)


@torch.no_grad()
def test_multi_token_prediction_opens_streams_and_carries_of_its_own() -> None:
    made, plain = (carrying(residual, mtp={"depth": 2}) for residual in ("doubled", "prenorm"))
    hidden = plain.hidden(TOKENS)[0]
    found, right = (m.mtp_nll(hidden, TOKENS, TOKENS.roll(-1, 1))[0] for m in (made, plain))
    torch.testing.assert_close([nll for nll, _ in found], [nll for nll, _ in right])


def test_a_block_that_goes_token_by_token_leaves_keys_of_other_tokens_as_they_are() -> None:
    """Keys that a layer below lends are of all tokens of the cache, 7 before these 3."""
    lent, summed = drawn(2, 10, 4), drawn(2, 3, 5)
    given = Pass(order(3), carry={"keys": lent, "sum": summed})
    for t, (_, each) in enumerate(_by_token(drawn(2, 3, 8), given)):
        each.carry["sum"] = each.carry["sum"] + 1
        each.carry["place"] = torch.full((2, 1), t)
    assert given.carry["keys"] is lent and torch.equal(given.carry["sum"], summed + 1)
    assert given.carry["place"].tolist() == [[0, 1, 2]] * 2


def test_what_is_carried_is_split_and_joined_by_tokens() -> None:
    carry = {"a": torch.randn(2, 7, 3), "b": torch.randn(2, 7)}
    head, tail = split(carry, 4)
    assert head["a"].shape == (2, 4, 3) and tail["b"].shape == (2, 3)
    assert all(torch.equal(tensor, carry[name]) for name, tensor in joined(head, tail).items())
