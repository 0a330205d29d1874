"""Which implementation runs: chosen for the device, overridable, and the same result by each."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels import seam
from blockwright.blocks.kernels.choice import KERNELS, Kernels, check, choose
from blockwright.blocks.kernels.experts import Choices
from blockwright.blocks.kernels.seam import implementations
from blockwright.registry import ConfigError

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 24,
    "n_layers": 2,
    "attention": {"name": "mla", "n_heads": 2},
    "position": "rope",
    "ffn": {"name": "moe", "n_experts": 5, "shared": {"name": "swiglu", "d_ff": 10}},
    "gating": {"name": "softmax_topk", "top_k": 2},
    "experts": {"name": "swiglu", "d_ff": 9},
    "norm": "rmsnorm",
    "residual": "prenorm",
}


def loss_and_gradients(decoder: Decoder) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(61, (2, 131))
    loss = decoder.nll(decoder.hidden(tokens[:, :-1])[0], tokens[:, 1:])
    return [loss, *torch.autograd.grad(loss, list(decoder.parameters()))]


HERE = [(k, name) for k in KERNELS for name, one in implementations(k).items() if one.runs_on("cpu", (0, 0))]


@pytest.mark.slow
def test_every_implementation_gives_the_same_loss_and_gradients() -> None:
    decoder = compose(MODEL).double()
    expected = loss_and_gradients(decoder)
    for kernel, name in HERE:
        other = copy.deepcopy(decoder).choose_kernels({kernel: name})
        assert getattr(other.kernels, kernel) == name
        for one, right in zip(loss_and_gradients(other), expected, strict=True):
            torch.testing.assert_close(
                one, right, rtol=1e-9, atol=1e-9, msg=lambda m, k=kernel, n=name: f"{k}={n}: {m}"
            )


def test_implementation_of_a_package_that_is_missing_names_the_package() -> None:
    with pytest.raises(ConfigError, match=r"liger_kernel.*cross_entropy=auto"):
        check({"cross_entropy": "liger"}, "task.kernels")


def test_choice_is_made_for_the_device_reaches_every_block_and_follows_the_weights() -> None:
    decoder = compose(MODEL)
    assert decoder.kernels == choose(torch.device("cpu")) and decoder.kernels.experts == "segments"
    blocks = [m for m in decoder.modules() if isinstance(m, Block)]
    assert len(blocks) > 10 and all(b.kernels is decoder.kernels for b in blocks)
    decoder.choose_kernels({"attention": "sdpa"}).to("meta")
    assert (decoder.kernels.experts, decoder.kernels.attention) == ("grouped", "sdpa")
    assert all(b.kernels is decoder.kernels for b in decoder.modules() if isinstance(b, Block))
    assert copy.deepcopy(decoder).kernels == decoder.kernels


def test_implementation_asked_for_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name, one in implementations("experts").items():

        def spy(*given: Any, name: str = name, call: Any = one.call) -> torch.Tensor:
            ran.append(name)
            return call(*given)

        monkeypatch.setitem(seam._known["experts"], name, replace(one, call=spy))
    seam.chain.cache_clear()
    choices = Choices(torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    arguments = (torch.randn(3, 4), choices, torch.randn(2, 6, 4), torch.randn(2, 4, 3))
    for kernels in (Kernels(), Kernels(experts="grouped"), Kernels(experts="segments")):
        kernels.swiglu_experts(*arguments)
    seam.chain.cache_clear()
    assert ran == ["segments", "grouped", "segments"]


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({"atention": "sdpa"}, "task.kernels.atention"),
        ({"experts": "lop"}, "task.kernels.experts"),
        (5, "task.kernels"),
    ],
)
def test_override_with_an_unknown_name_is_refused(overrides: dict[str, str], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(overrides, "task.kernels")
    assert caught.value.path == path
    assert check(dict.fromkeys(KERNELS, "auto"), "task.kernels") == dict.fromkeys(KERNELS, "auto")
