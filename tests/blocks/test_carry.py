"""What crosses depth: opened and closed streams, and what blocks of one layer leave for those of later layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.attention.gqa import GQA
from blockwright.blocks.carry import joined, split
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm.base import Norm
from blockwright.blocks.residual.base import Mixer
from blockwright.blocks.residual.prenorm import PreNorm
from blockwright.registry import ConfigError, register
from blockwright.training.parallel.recompute import recompute

MODEL: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 24,
    "n_layers": 3,
    "max_positions": 64,
    "attention": {"name": "summing", "n_heads": 4, "n_kv_heads": 2},
    "position": "rope",
    "ffn": {"name": "swiglu", "d_ff": 16},
    "norm": "rmsnorm",
    "residual": "doubled",
    "init": {"std": 0.2, "depth_scaled": False},
}
TOKENS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))


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

        def close(self, x: Tensor) -> Tensor:
            return x[:, :, 1] - x[:, :, 0]

        def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
            return self.open(super().forward(x[:, :, 1], attention, ffn))

    yield


def gradients(decoder: Decoder) -> list[Tensor]:
    loss = decoder.nll(decoder.hidden(TOKENS[:, :-1])[0], TOKENS[:, 1:])
    return list(torch.autograd.grad(loss, list(decoder.parameters())))


def test_layers_read_what_those_below_left() -> None:
    decoder, seen = compose(MODEL), list[Tensor]()
    read: list[Tensor] = []
    for layer in decoder.layers:
        layer.attention.query.register_forward_pre_hook(lambda module, given: read.append(given[0]))  # type: ignore[union-attr]
        layer.residual.attention_norm.register_forward_hook(lambda module, given, y: seen.append(y))  # type: ignore[union-attr]
    with torch.no_grad():
        decoder(TOKENS)
    for depth in range(3):
        torch.testing.assert_close(read[depth], torch.stack(seen[: depth + 1]).sum(0).tanh())


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_layers_have_the_same_gradients(how: Any) -> None:
    decoder = compose(MODEL)
    other = copy.deepcopy(decoder)
    recompute(other, how)
    for mine, theirs in zip(gradients(decoder), gradients(other), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_steps_equal_one_pass() -> None:
    decoder = compose(MODEL).eval()
    caches = decoder.new_caches(2, 9)
    with torch.no_grad():
        steps = torch.cat([decoder.hidden(part, caches=caches)[0] for part in TOKENS.split(2, 1)], 1)
        torch.testing.assert_close(steps, decoder.hidden(TOKENS)[0], rtol=0, atol=1e-5)


def test_streams_are_opened_once_and_closed_once() -> None:
    decoder, plain = compose(MODEL), compose({**MODEL, "residual": "prenorm"})
    with torch.no_grad():  # the closed streams are twice the one stream, and the norm divides by it
        torch.testing.assert_close(decoder(TOKENS), plain(TOKENS), rtol=0, atol=1e-4)


def test_multi_token_prediction_opens_streams_and_carries_of_its_own() -> None:
    decoder, plain = (compose({**MODEL, "residual": r, "mtp": {"depth": 2}}) for r in ("doubled", "prenorm"))
    hidden = plain.hidden(TOKENS)[0].detach()
    targets = TOKENS.roll(-1, 1)
    for (mine, _), (theirs, _) in zip(*(d.mtp_nll(hidden, TOKENS, targets)[0] for d in (decoder, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_layers_with_other_streams_are_refused() -> None:
    variants = {"plain": {"name": "prenorm"}, "doubled": {"name": "doubled"}}
    mixed = {"variants": {"residual": variants}, "layout": {"residual": "doubled plain*"}}
    with pytest.raises(ConfigError, match="one stream, and the first layer 2 streams") as caught:
        compose({**MODEL, **mixed})
    assert caught.value.path == "model.variants.residual.plain"


def test_what_is_carried_is_split_and_joined_by_tokens() -> None:
    carry = {"a": torch.randn(2, 7, 3), "b": torch.randn(2, 7)}
    head, tail = split(carry, 4)
    assert head["a"].shape == (2, 4, 3) and tail["b"].shape == (2, 3)
    assert all(torch.equal(tensor, carry[name]) for name, tensor in joined(head, tail).items())
