"""Low-rank adapters: the base at first, frozen always, merged exactly, on every path that reads a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import initialise_added
from blockwright.blocks.linear import B, adaptable, attach, is_adapter, merged, switched_off
from blockwright.registry import ConfigError
from blockwright.training.starts import Lora
from tests.blocks.small import Make, near

MLA = {"attention": {"name": "mla", "q_lora_rank": 12}}
ALL = ["attention", "ffn", "head"]


@pytest.fixture
def adapted(tiny: Make) -> Make:
    def make(targets: list[str] = ALL, trained: bool = True, **changes: Any) -> Decoder:
        decoder = compose(tiny(moe=True, **changes)).double().eval()
        known = list(decoder.parameters())
        Lora(targets, rank=3).attach(decoder)
        initialise_added(decoder, known, **decoder.config["init"], n_layers=len(decoder.layers), seed=0)
        draw = torch.Generator().manual_seed(1)
        for name, parameter in decoder.named_parameters():
            if trained and name.endswith(B):
                parameter.data.normal_(0, 0.1, generator=draw)
        return decoder

    return make


TOKENS = torch.arange(22).view(2, 11) % 61


def test_new_adapter_changes_no_number(tiny: Make, adapted: Make) -> None:
    decoder = adapted(trained=False, **MLA)
    assert torch.equal(decoder(TOKENS), compose(tiny(moe=True, **MLA)).double()(TOKENS))
    assert all(p.any() != name.endswith(B) for name, p in decoder.named_parameters() if is_adapter(name))


@pytest.mark.parametrize("changes", [{}, MLA, {"experts": {"name": "clamped_swiglu", "d_ff": 12}}])
def test_merged_weights_give_what_the_adapter_gives(adapted: Make, changes: dict[str, Any]) -> None:
    """In one pass, and token by token with caches, where MLA reads a matrix instead of calling its layer."""
    decoder = adapted(**changes)
    found = decoder(TOKENS)
    plain = compose(decoder.config).double().eval()
    base = {name: t for name, t in decoder.state_dict().items() if not is_adapter(name)}
    plain.load_state_dict(base)
    assert (plain(TOKENS) - found).abs().max() > 1e-2
    with switched_off(decoder):
        assert torch.equal(decoder(TOKENS), plain(TOKENS))
    plain.load_state_dict(merged(decoder.state_dict(), 16 / 3))
    near(plain(TOKENS), found, 1e-6)
    caches = decoder.new_caches(2, 11)
    steps = [decoder(TOKENS[:, i : i + 1], caches=caches) for i in range(11)]
    near(torch.cat(steps, 1), found, 1e-6)


def test_gradient_reaches_adapters_alone(adapted: Make) -> None:
    """And is that of the matrices themselves: ∂L/∂B = s ∂L/∂W Aᵀ, ∂L/∂A = s Bᵀ ∂L/∂W."""
    decoder = adapted(**MLA)
    before = {n: p.clone() for n, p in decoder.named_parameters()}
    decoder.nll(decoder.hidden(TOKENS)[0], TOKENS).backward()
    assert {n for n, p in decoder.named_parameters() if p.grad is not None} == {n for n in before if is_adapter(n)}
    plain = compose(decoder.config).double()
    plain.load_state_dict(merged(decoder.state_dict(), 16 / 3))
    plain.nll(plain.hidden(TOKENS)[0], TOKENS).backward()
    for name in adaptable(plain):
        if (a := before.get(f"{name}_lora_a")) is None:
            continue
        whole, b = plain.get_parameter(name).grad, before[f"{name}_lora_b"]
        near(decoder.get_parameter(f"{name}_lora_b").grad, 16 / 3 * whole @ a.mT, 1e-9, 1e-5)
        near(decoder.get_parameter(f"{name}_lora_a").grad, 16 / 3 * b.mT @ whole, 1e-9, 1e-5)


def test_targets_are_patterns_of_linear_layers_and_stacks(tiny: Make) -> None:
    decoder = compose(tiny(moe=True), device="meta")
    Lora(["layers.1.ffn"]).attach(decoder)
    trained = {name for name, p in decoder.named_parameters() if p.requires_grad}
    stems = ("experts.gate_up", "experts.down", *(f"shared.{n}.weight" for n in ("gate", "up", "down")))
    assert trained == {f"layers.1.ffn.{stem}_lora_{side}" for stem in stems for side in "ab"}
    for target in ("norm", "gating", "embedding", "atention"):
        with pytest.raises(ConfigError, match=r"adapter\.targets"):
            Lora([target]).attach(compose(tiny(moe=True), device="meta"))


def test_draws_do_not_depend_on_other_adapters(adapted: Make) -> None:
    some, all_ = adapted(["attention"], trained=False), adapted(trained=False)
    both = {n: p for n, p in some.named_parameters() if is_adapter(n)}
    assert both and all(torch.equal(p, all_.get_parameter(n)) for n, p in both.items())


def test_size_of_an_adapter_of_rank_8_is_below_two_percent() -> None:
    """Of DeepSeek-V2-Lite's attention; a plain count, so that a full-rank factor would show."""
    decoder = compose({"inherits": "deepseek_v2_lite", "n_layers": 3}, device="meta")
    whole = sum(p.numel() for p in decoder.parameters())
    attach(decoder, [n for n in adaptable(decoder) if "attention" in n], 8, 2.0)
    assert 0 < sum(p.numel() for p in decoder.parameters() if p.requires_grad) < 0.02 * whole
