"""How weights start: by a rule, by name and seed, whatever the neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import initialise, stable_seed

OUTPUTS = {"attention.output.weight", "ffn.down.weight", "ffn.experts.down", "ffn.shared.down.weight"}


@pytest.fixture
def wide(tiny: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Wide enough that a standard deviation can be read off a tensor."""
    return lambda **changes: tiny(moe=True, d_model=96, vocab_size=200, n_layers=4, **changes)


def in_layers(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {n.split(".", 2)[2]: p for n, p in decoder.named_parameters() if n.startswith("layers.3.")}


@pytest.mark.parametrize("std", [0.02, 0.006])
def test_matrices_are_normal_gains_one_and_biases_zero(wide: Callable[..., Any], std: float) -> None:
    attention = {"name": "gqa", "bias": True}
    decoder = compose(wide(norm="layernorm", attention=attention, init={"std": std, "depth_scaled": False}))
    for name, p in decoder.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert p.detach().std().item() == pytest.approx(std, rel=0.1), name
            assert p.mean().abs() < 4 * std / p.numel() ** 0.5, name


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_depth_scaling_shrinks_exactly_what_writes_into_the_stream(wide: Callable[..., Any], attention: str) -> None:
    init = {"std": 0.02, "depth_scaled": True}
    scaled, plain = (compose(wide(attention=attention, init={**init, "depth_scaled": s})) for s in (True, False))
    shrunk = {n for n, p in in_layers(scaled).items() if not torch.equal(p, in_layers(plain)[n])}
    assert shrunk == OUTPUTS - {"ffn.down.weight"}  # layer 3 is a mixture
    for name in shrunk:
        torch.testing.assert_close(in_layers(scaled)[name], in_layers(plain)[name] / 8**0.5)
    same = set(dict(scaled.named_parameters())) - {
        f"layers.{i}.{n}" for i in range(4) for n in OUTPUTS if f"layers.{i}.{n}" in scaled.state_dict()
    }
    assert all(torch.equal(scaled.state_dict()[n], plain.state_dict()[n]) for n in same)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"attention": "mla"}, "attention."),
        ({"attention": {"name": "gqa", "n_heads": 4}}, "attention."),
        ({"residual": "sandwich"}, "residual."),
        ({"ffn": "gelu", "layout": {}, "variants": {}}, "ffn."),
        ({"gating": "sigmoid_bias"}, "ffn.gating."),
        ({"experts": {"name": "swiglu", "d_ff": 8}}, "ffn.experts."),
        ({"position": "learned"}, "position."),
        ({"tie_embeddings": True}, "head."),
        ({"norm": "layernorm"}, "norm"),
    ],
    ids=str,
)
def test_swapping_one_block_leaves_every_other_weight_to_the_bit(
    tiny: Callable[..., Any], change: dict[str, Any], where: str
) -> None:
    before, after = (compose(c).state_dict() for c in (tiny(moe=True), {**tiny(moe=True), **change}))
    others = [n for n in before if where not in n]
    assert others and all(torch.equal(before[n], after[n]) for n in others)


def test_deepening_leaves_the_layers_that_were_there(tiny: Callable[..., Any]) -> None:
    shallow, deep = compose(tiny()).state_dict(), compose(tiny(n_layers=5)).state_dict()
    assert all(torch.equal(v, deep[n]) for n, v in shallow.items())


def test_seeds_differ_and_each_repeats(tiny: Callable[..., Any]) -> None:
    one, again, other = (compose(tiny(moe=True), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(v, again[n]) for n, v in one.items())
    assert all(not torch.equal(v, other[n]) for n, v in one.items() if v.ndim > 1)


def test_no_two_tensors_share_a_draw(tiny: Callable[..., Any]) -> None:
    starts = [round(p.flatten()[0].item(), 12) for p in compose(tiny(n_layers=3)).parameters() if p.ndim > 1]
    assert len(set(starts)) == len(starts)


def test_global_random_state_is_neither_read_nor_moved(tiny: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    one = compose(tiny()).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = compose(tiny()).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, other[n]) for n, v in one.items())


def test_seed_of_a_name_is_the_same_in_every_process() -> None:
    assert stable_seed(0, "layers.0.attention.query.weight") == 18310127655789123
    assert stable_seed(1, "a") != stable_seed(0, "a") != stable_seed(0, "b")


def test_buffers_start_at_zero(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny(moe=True, gating="sigmoid_bias"))
    buffers = dict(decoder.named_buffers())
    assert {name.rpartition(".")[2] for name in buffers} == {"bias", "moved"}
    assert all((buffer == 0).all() for buffer in buffers.values())


def test_block_may_set_what_the_rule_does_not_suit() -> None:
    class Own(Block):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, 2))
            self.noise = nn.Parameter(torch.empty(3))

        def reset_parameters(self) -> None:
            self.weight.fill_(7)
            self.noise.normal_()

    noises = []
    for seed in (0, 0, 1):
        model = nn.ModuleDict({"a": Own(), "b": Own()})
        torch.manual_seed(seed + 10)
        initialise(model, std=0.1, depth_scaled=False, n_layers=1, seed=seed)
        assert (model["a"].weight == 7).all()
        noises.append((model["a"].noise.tolist(), model["b"].noise.tolist()))
    assert noises[0] == noises[1] != noises[2] and noises[0][0] != noises[0][1]
