"""Generation: the cached loop gives what recomputing everything gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import registry
from blocks.compose import compose
from blocks.decoder import Decoder
from blocks.generate import generate, sample


@pytest.fixture
def make(tiny: Callable[..., Any], randomise: Callable[..., None]) -> Callable[..., Decoder]:
    def build(**changes: Any) -> Decoder:
        decoder = compose(tiny(**changes)).eval()
        randomise(decoder)
        return decoder

    return build


def prompt(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def greedy(decoder: Decoder, tokens: Tensor, new: int) -> Tensor:
    for _ in range(new):
        tokens = torch.cat((tokens, decoder(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
@pytest.mark.parametrize("attention", registry.names("attention"))
def test_greedy_decoding_equals_recomputing_everything(
    make: Callable[..., Decoder], attention: str, position: str
) -> None:
    decoder = make(attention=attention, position=position).double()
    assert torch.equal(generate(decoder, prompt(), 12, temperature=0), greedy(decoder, prompt(), 12))


def test_greedy_decoding_works_with_experts(make: Callable[..., Decoder]) -> None:
    decoder = make(moe=True).double()
    assert torch.equal(generate(decoder, prompt(), 12, temperature=0), greedy(decoder, prompt(), 12))


def test_prompt_stays_and_rows_do_not_mix(make: Callable[..., Decoder]) -> None:
    decoder = make().double()
    out = generate(decoder, prompt(), 7, temperature=0)
    assert out.shape == (3, 12) and torch.equal(out[:, :5], prompt())
    for row in range(3):
        assert torch.equal(generate(decoder, prompt()[row : row + 1], 7, temperature=0)[0], out[row])


def test_nothing_new_is_the_prompt(make: Callable[..., Decoder]) -> None:
    assert torch.equal(generate(make(), prompt(), 0), prompt())


def test_seed_repeats_a_sample_and_another_seed_gives_another(make: Callable[..., Decoder]) -> None:
    decoder = make()
    one, again, other = (generate(decoder, prompt(), 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_global_random_state_is_neither_read_nor_moved(make: Callable[..., Decoder]) -> None:
    decoder = make()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = generate(decoder, prompt(), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(generate(decoder, prompt(), 5), first)


def test_one_candidate_is_greedy(make: Callable[..., Decoder]) -> None:
    decoder = make().double()
    assert torch.equal(generate(decoder, prompt(), 12, top_k=1, seed=5), greedy(decoder, prompt(), 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generation_works_in_other_precisions_and_leaves_no_gradient(
    make: Callable[..., Decoder], dtype: torch.dtype
) -> None:
    decoder = make(attention="mla", moe=True).to(dtype)
    out = generate(decoder, prompt(), 4)
    assert out.shape == (3, 9) and ((out >= 0) & (out < 61)).all()
    assert not out.requires_grad and all(p.grad is None for p in decoder.parameters())


# --- sampling ---------------------------------------------------------------------------------------------------------


def frequencies(logits: Tensor, temperature: float, top_k: int | None = None, n: int = 20_000) -> Tensor:
    draws = sample(logits.expand(n, -1), temperature, top_k, torch.Generator().manual_seed(0))
    return torch.bincount(draws, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_softmax_at_that_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(logits, temperature), expected, rtol=0, atol=0.015)


def test_only_the_likeliest_k_are_drawn_in_their_proportions() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    expected = torch.zeros(4)
    expected[[0, 3]] = logits[[0, 3]].softmax(-1)
    torch.testing.assert_close(frequencies(logits, 1.0, 2), expected, rtol=0, atol=0.015)


def test_more_candidates_than_tokens_are_all_of_them() -> None:
    logits = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(frequencies(logits, 1.0, 99), frequencies(logits, 1.0))


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert sample(logits, 0, None, torch.Generator()).tolist() == [1, 0]
