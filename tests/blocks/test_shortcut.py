"""A branch that joins the stream one layer later: against a loop over the layers, recomputed, and step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.compose import check, compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError
from blockwright.training.parallel.recompute import recompute

NOW, LATER = {"name": "swiglu", "d_ff": 16}, {"name": "gelu", "d_ff": 20}
MIXTURE = {"name": "moe", "n_experts": 5}
TOKENS = torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(0))
# of each layer: whether it has a branch that is late
PATTERNS = {"every layer": "ffn*", "in pairs": "(ffn closing)*", "two in a row": "ffn*2 closing*"}


@pytest.fixture
def model(randomise: Callable[..., None]) -> Callable[..., Decoder]:
    def make(later: Any = LATER, layout: str = "ffn*", dtype: torch.dtype = torch.float64) -> Decoder:
        config = {
            "vocab_size": 31,
            "d_model": 24,
            "n_layers": 4,
            "max_positions": 64,
            "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
            "position": "rope",
            "ffn": {"name": "shortcut", "now": NOW, "later": later},
            "gating": {"name": "softmax_bias", "top_k": 2},
            "experts": {"name": "with_identity", "n_idle": 2, "experts": {"name": "swiglu", "d_ff": 8}},
            "norm": "rmsnorm",
            "residual": "prenorm",
            "variants": {"ffn": {"closing": {"name": "shortcut", "now": NOW}}},
            "layout": {"ffn": layout},
        }
        decoder = compose(config).to(dtype)
        randomise(decoder, scale=1.0)
        return decoder

    return make


def slowly(decoder: Decoder) -> Tensor:
    """Logits with each branch added where it belongs, the layers written out."""
    given, late = Pass(torch.arange(TOKENS.shape[1])[None]), None
    x = decoder.look_up(TOKENS)
    layers: list[Any] = list(decoder.layers)
    for i, layer in enumerate(layers):
        x = x + layer.attention(layer.residual.attention_norm(x), given)
        h = layer.residual.ffn_norm(x)
        x = x + layer.ffn.now(h)[0] + (0 if late is None else late)
        late = None if layer.ffn.later is None else layer.ffn.later(h)[0]
        if i == len(layers) - 1 and late is not None:
            x = x + late
    return decoder.logits(decoder.norm(x))


@pytest.mark.parametrize("later", [LATER, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("layout", PATTERNS.values(), ids=PATTERNS)
def test_branch_is_added_one_layer_later(model: Callable[..., Decoder], later: Any, layout: str) -> None:
    decoder = model(later, layout)
    found, expected = decoder(TOKENS), slowly(decoder)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    learned = list(decoder.parameters())
    ours, theirs = (torch.autograd.grad(logits.square().mean(), learned) for logits in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("layout", PATTERNS.values(), ids=PATTERNS)
def test_recomputation_reads_what_was_read_before(model: Callable[..., Decoder], layout: str, how: Any) -> None:
    decoder = model(layout=layout)
    other = copy.deepcopy(decoder)
    recompute(other, how)
    both = [torch.autograd.grad(m(TOKENS).square().mean(), list(m.parameters())) for m in (decoder, other)]
    for one, again in zip(*both, strict=True):
        torch.testing.assert_close(one, again, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("layout", PATTERNS.values(), ids=PATTERNS)
def test_steps_and_the_last_token_alone_equal_one_pass(model: Callable[..., Decoder], layout: str) -> None:
    decoder = model(MIXTURE, layout).eval()
    whole, caches = decoder.hidden(TOKENS)[0], decoder.new_caches(2, 11)
    steps = torch.cat([decoder.hidden(part, caches=caches)[0] for part in TOKENS.split((4, 1, 3, 1, 2), 1)], 1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-6)  # routers are single precision
    last = decoder.last_hidden(TOKENS, decoder.new_caches(2, 11))
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-6)


def test_routing_that_is_reported_is_that_of_the_late_branch(model: Callable[..., Decoder]) -> None:
    routings = model(MIXTURE, "(ffn closing)*").hidden(TOKENS)[1]
    assert [routing is not None for routing in routings] == [True, False, True, False]


def test_branch_of_this_layer_must_be_dense() -> None:
    model = {
        "vocab_size": 31,
        "d_model": 32,
        "n_layers": 2,
        "max_positions": 64,
        "attention": "gqa",
        "position": "rope",
    }
    model |= {
        "norm": "rmsnorm",
        "residual": "prenorm",
        "gating": "softmax_topk",
        "experts": {"name": "relu2", "d_ff": 8},
    }
    with pytest.raises(ConfigError, match="must be dense") as caught:
        check({**model, "ffn": {"name": "shortcut", "now": MIXTURE}})
    assert caught.value.path == "model.ffn.now"


@pytest.mark.parametrize("layout", ["ffn plain", "ffn plain*"])
def test_a_layer_that_would_drop_what_is_late_is_refused(layout: str) -> None:
    dense = {"name": "swiglu", "d_ff": 16}
    changes = {"ffn": {"name": "shortcut", "later": dense}, "variants": {"ffn": {"plain": dense}}}
    with pytest.raises(ConfigError, match="would drop what the feed-forward block of layer 0 leaves") as caught:
        check(preset("tiny", {"vocab_size": 61, "n_layers": 2, **changes, "layout": {"ffn": layout}}))
    assert caught.value.path == "model.variants.ffn.plain"


def test_a_visit_that_would_drop_what_the_one_before_left_is_refused() -> None:
    dense = {"name": "swiglu", "d_ff": 16}
    changes = {
        "ffn": {"name": "shortcut", "later": dense},
        "variants": {"ffn": {"plain": dense, "now": {"later": None}}},
    }
    model = {"vocab_size": 61, "n_layers": 3, **changes, "loop": {"name": "cycle", "last": 1}}
    check(preset("tiny", {**model, "layout": {"ffn": "now ffn now"}}))
    check(preset("tiny", {**model, "loop": None, "layout": {"ffn": "plain ffn now"}}))
    with pytest.raises(ConfigError, match="layer 1 leaves for that of layer 0"):
        check(preset("tiny", {**model, "layout": {"ffn": "plain ffn now"}}))


def test_a_last_layer_leaves_nothing() -> None:
    dense = {"name": "swiglu", "d_ff": 16}
    changes = {"ffn": {"name": "shortcut", "later": dense}, "variants": {"ffn": {"plain": dense}}}
    check(preset("tiny", {"vocab_size": 61, "n_layers": 2, **changes, "layout": {"ffn": "plain ffn"}}))
