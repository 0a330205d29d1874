"""How weights start: by a rule, by name and seed, whatever the neighbours, the rank or the make of the layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose
from blockwright.blocks.initialise import draw_part, initialise, skip, stable_seed
from blockwright.blocks.linear import Linear, linears
from tests.blocks.small import Make

OUTPUTS = {"attention.output.weight", "ffn.down.weight", "ffn.experts.down", "ffn.shared.down.weight"}


def wide(tiny: Make, **changes: Any) -> dict[str, Any]:
    """Wide enough that a standard deviation can be read off a tensor."""
    return tiny(moe=True, d_model=96, vocab_size=200, n_layers=3, **changes)


@pytest.mark.parametrize("std", [0.02, 0.006])
def test_matrices_are_normal_gains_one_and_biases_zero(tiny: Make, std: float) -> None:
    attention = {"name": "gqa", "bias": True}
    decoder = compose(wide(tiny, norm="layernorm", attention=attention, init={"std": std, "depth_scaled": False}))
    for name, p in decoder.named_parameters():
        if p.ndim == 1:
            assert (p == float(not name.endswith("bias"))).all(), name
        else:
            assert p.detach().std().item() == pytest.approx(std, rel=0.1), name
            assert p.mean().abs() < 4 * std / p.numel() ** 0.5, name
    starts = [p.flatten()[0].item() for p in decoder.parameters() if p.ndim > 1]
    assert len(set(starts)) == len(starts)  # no two share a draw


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_depth_scaling_shrinks_exactly_what_writes_into_the_stream(tiny: Make, attention: str) -> None:
    scaled, plain = (
        compose(wide(tiny, attention=attention, init={"std": 0.02, "depth_scaled": s})).state_dict()
        for s in (True, False)
    )
    for name, value in scaled.items():
        if name.partition("layers.")[2][2:] in OUTPUTS:
            torch.testing.assert_close(value, plain[name] / 6**0.5)
        else:
            assert torch.equal(value, plain[name]), name


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
        ({"n_layers": 4}, "no weight"),
    ],
    ids=str,
)
def test_swapping_one_block_leaves_every_other_weight_to_the_bit(tiny: Make, change: Any, where: str) -> None:
    before, after = (compose(c).state_dict() for c in (tiny(moe=True), {**tiny(moe=True), **change}))
    others = [n for n in before if where not in n]
    assert others and all(torch.equal(before[n], after[n]) for n in others)


def test_weights_depend_on_the_seed_alone_and_leave_the_global_random_state(tiny: Make) -> None:
    torch.manual_seed(1)
    one = compose(tiny(moe=True, gating="sigmoid_bias"), seed=1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = (compose(one.config, seed=s).state_dict() for s in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, again[name]) and (value.ndim < 2 or not torch.equal(value, other[name])), name
    buffers = dict(one.named_buffers())
    assert {name.rpartition(".")[2] for name in buffers} == {"bias", "moved"}
    assert all((buffer == 0).all() for buffer in buffers.values())


def test_seed_of_a_name_is_the_same_in_every_process() -> None:
    assert stable_seed(0, "layers.0.attention.query.weight") == 18310127655789123
    assert stable_seed(1, "a") != stable_seed(0, "a") != stable_seed(0, "b")


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
        model: Any = nn.ModuleDict({"a": Own(), "b": Own()})
        torch.manual_seed(seed + 10)
        initialise(model, std=0.1, depth_scaled=False, n_layers=1, seed=seed)
        assert (model["a"].weight == 7).all()
        noises.append((model["a"].noise.tolist(), model["b"].noise.tolist()))
    assert noises[0] == noises[1] != noises[2] and noises[0][0] != noises[0][1]


@pytest.mark.parametrize("n", [16, 624, 1 << 20])
def test_generator_that_skips_continues_as_one_that_drew(n: int) -> None:
    one, other = (torch.Generator().manual_seed(11) for _ in range(2))
    torch.empty(n).normal_(generator=one)
    skip(other, n)
    assert torch.equal(torch.randn(4000, generator=one), torch.randn(4000, generator=other))


@pytest.mark.parametrize(
    ("shape", "part", "offset"),
    [
        ((40, 64, 48), (7, 10, 48), (13, 20, 0)),
        ((33, 16), (1, 16), (32, 0)),
        ((64, 80), (64, 13), (0, 67)),
        ((9, 7), (3, 7), (2, 0)),  # rows that are no whole blocks
        ((9, 7), (9, 7), (0, 0)),
        ((8, 32), (0, 32), (8, 0)),
    ],
)
def test_part_is_what_the_whole_has_there(shape: Any, part: Any, offset: Any) -> None:
    whole = torch.empty(shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(7))
    for dtype in (torch.float32, torch.bfloat16):
        own = torch.empty(part, dtype=dtype)
        draw_part(own, torch.Size(shape), offset, 0.02, 7)
        right = whole.to(dtype)[tuple(slice(o, o + n) for o, n in zip(offset, part, strict=True))]
        assert own.shape == torch.Size(part) and torch.equal(own, right)


class Counted(nn.Linear):
    """What a library of low-precision layers might give."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(input)


@pytest.mark.parametrize("attention", [{"name": "gqa", "bias": True}, "mla"], ids=["gqa", "mla"])
def test_layers_of_another_make_start_alike_and_are_used(tiny: Make, attention: Any) -> None:
    model = tiny(True, attention=attention)
    with linears(Counted):
        theirs = compose(model, seed=3)
    ours = compose(model, seed=3)
    made = [m for m in theirs.modules() if isinstance(m, Counted)]
    assert len(made) == sum(isinstance(m, Linear) for m in ours.modules()) > 5
    assert not any(isinstance(m, Linear) for m in theirs.modules())
    for (name, one), (other_name, other) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)
    tokens = torch.arange(12)[None] % 61
    torch.testing.assert_close(theirs(tokens), ours(tokens))
    assert {name for name, m in theirs.named_modules() if isinstance(m, Counted) and not m.calls} <= {"head"}
    with linears(Counted):  # a copy is what it was
        assert sum(isinstance(m, Linear) for m in copy.deepcopy(ours).modules()) == len(made)
