"""A branch that joins the stream one layer later: against a loop over the layers, recomputed, and step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.compose import check, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError
from blockwright.training.parallel.recompute import recompute
from tests.blocks.small import Make, ids, in_parts, near, order
from tests.blocks.small import decoder as small

NOW, LATER = {"name": "swiglu", "d_ff": 16}, {"name": "gelu", "d_ff": 20}
MIXTURE = {"name": "moe", "n_experts": 5}
TOKENS = ids(11)
# of each layer: whether it has a branch that is late
PATTERNS = {"every layer": "ffn*", "in pairs": "(ffn closing)*", "two in a row": "ffn*2 closing*"}


@pytest.fixture
def model(randomise: Make) -> Make:
    def make(later: Any = LATER, layout: str = "ffn*") -> Decoder:
        experts = {"name": "with_identity", "n_idle": 2, "experts": {"name": "swiglu", "d_ff": 8}}
        decoder = small(
            n_layers=4,
            ffn={"name": "shortcut", "now": NOW, "later": later},
            gating={"name": "softmax_bias", "top_k": 2},
            experts=experts,
            variants={"ffn": {"closing": {"name": "shortcut", "now": NOW}}},
            layout={"ffn": layout},
        )
        randomise(decoder, scale=1.0)
        return decoder

    return make


def slowly(decoder: Decoder) -> Tensor:
    """Logits with each branch added where it belongs, the layers written out."""
    given, late = Pass(order(11)), None
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


@pytest.mark.parametrize(("layout", "later"), each(list(PATTERNS.values()), [LATER, MIXTURE]))
def test_branch_is_added_one_layer_later(model: Make, later: Any, layout: str) -> None:
    decoder = model(later, layout)
    found, expected = decoder(TOKENS), slowly(decoder)
    near(found, expected)
    near(*(torch.autograd.grad(y.square().mean(), list(decoder.parameters())) for y in (found, expected)), 1e-10)


@pytest.mark.parametrize(("layout", "how"), each(list(PATTERNS.values()), ["full", "selective"]))
def test_recomputation_reads_what_was_read_before(model: Make, layout: str, how: Any) -> None:
    decoder = model(layout=layout)
    other = copy.deepcopy(decoder)
    recompute(other, how)
    near(*(torch.autograd.grad(m(TOKENS).square().mean(), list(m.parameters())) for m in (decoder, other)))


@torch.no_grad()
@pytest.mark.parametrize("layout", PATTERNS.values(), ids=PATTERNS)
def test_steps_and_the_last_token_alone_equal_one_pass(model: Make, layout: str) -> None:
    decoder = model(MIXTURE, layout)
    whole, routings = decoder.hidden(TOKENS)
    near(in_parts(decoder, TOKENS, (4, 1, 3, 1, 2)), whole, 1e-6)  # routers are single precision
    near(decoder.last_hidden(TOKENS, decoder.new_caches(2, 11)), whole[:, -1:], 1e-6)
    late = {"ffn*": "1111", "(ffn closing)*": "1010", "ffn*2 closing*": "1100"}[layout]  # what is reported is of these
    assert [routing is not None for routing in routings] == [c == "1" for c in late]


def test_a_visit_that_would_drop_what_the_one_before_left_is_refused_and_a_last_layer_leaves_nothing() -> None:
    dense = {"name": "swiglu", "d_ff": 16}
    variants = {"ffn": {"plain": dense, "now": {"later": None}}}

    def of(layout: str, n_layers: int = 3, loop: Any = None) -> dict[str, Any]:
        changes = {"ffn": {"name": "shortcut", "later": dense}, "variants": variants, "loop": loop}
        return check(preset("tiny", {"vocab_size": 61, "n_layers": n_layers, **changes, "layout": {"ffn": layout}}))

    twice = {"name": "cycle", "last": 1}
    of("now ffn now", loop=twice)
    of("plain ffn now")
    of("plain ffn", 2)
    with pytest.raises(ConfigError, match="layer 1 leaves for that of layer 0"):
        of("plain ffn now", loop=twice)
