"""The connections of a layer are observed: norms where the residual block applies them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.norm.base import Norm
from blockwright.blocks.norm.rmsnorm import RMSNorm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.lab.drawing.wiring import Branch, branches, norms
from blockwright.registry.recording import recorded

PRE = (Branch(("attention",), before="attention_norm"), Branch(("ffn",), before="ffn_norm"))
SANDWICH = (
    Branch(("attention",), before="attention_norm", after="attention_out_norm"),
    Branch(("ffn",), before="ffn_norm", after="ffn_out_norm"),
)
EXPECTED = {
    "attention_residual": PRE,
    "convolved": PRE,
    "hyper_connections": PRE,
    "mhc": PRE,
    "mixture_of_depths": PRE,
    "normed_embeddings": PRE,
    "parallel": (Branch(("attention", "ffn"), before="attention_norm"),),
    "postnorm": (Branch(("attention",), beyond="attention_norm"), Branch(("ffn",), beyond="ffn_norm")),
    "pre_postnorm": (
        Branch(("attention",), before="attention_norm", beyond="attention_sum_norm"),
        Branch(("ffn",), before="ffn_norm", beyond="ffn_sum_norm"),
    ),
    "prenorm": PRE,
    "reordered": (Branch(("attention",), after="attention_norm"), Branch(("ffn",), after="ffn_norm")),
    "sandwich": SANDWICH,
    "scaled_sandwich": SANDWICH,
    "sigmoid_skip": PRE,
}
AROUND = {"convolved", "normed_embeddings"}


def observed(residual: Any) -> tuple[Branch, ...]:
    with recorded() as records:
        decoder = compose(preset("tiny", {"vocab_size": 257, "residual": residual}), device="meta")
    block: Any = decoder.layers[1].residual
    return branches(block, norms(block, records), decoder.config["d_model"])


def test_every_residual_block_is_expected() -> None:
    assert set(EXPECTED) == {
        n for n in registry.names("residual") if registry.lookup("residual", n).provider == "blockwright"
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_branches(name: str) -> None:
    inner = {"residual": "prenorm"} if name in AROUND else {}
    assert observed({"name": name, **inner}) == EXPECTED[name]


class Swapped(Residual):
    """A plug-in's block: the ffn first, after a norm; then the attention, normed behind."""

    def __init__(self, first: Norm, last: Norm) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = x + ffn(self.first(x))
        return x + self.last(attention(x))


class Bare(Residual):
    """A plug-in's block without a norm, whose mixers run side by side."""

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        return x + attention(x) + ffn(x)


def test_mixers_that_read_the_stream_itself_are_side_by_side() -> None:
    assert branches(Bare(), {}, 8) == (Branch(("attention", "ffn")),)


def test_plug_in_is_drawn_as_it_computes() -> None:
    with torch.device("meta"):
        first, last = RMSNorm(8), RMSNorm(8)
    found = branches(Swapped(first, last), {"first": first, "last": last}, 8)
    assert found == (Branch(("ffn",), before="first"), Branch(("attention",), after="last"))
