"""A text that is continued again and again gives the tokens of a fresh reading, and reads only what is new."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation import generate as module
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.memory import Memory
from blockwright.blocks.generation.sample import Sampling
from blockwright.registry import BlockError

ROOM = 64


@pytest.fixture
def make(tiny: Callable[..., Any], randomise: Callable[..., None]) -> Callable[..., Decoder]:
    def build(**changes: Any) -> Decoder:
        decoder = compose(tiny(**changes)).eval()
        randomise(decoder)
        return decoder.double()

    return build


def fresh(decoder: Decoder, prompt: list[int], n: int, sampling: Sampling | None = None, **more: Any) -> list[int]:
    tokens = [row[0] for row in Continuations(decoder, [prompt], n, sampling or Sampling(0), **more)]
    return [token for token in tokens if token is not None]


def turns(decoder: Decoder, sampling: Sampling, bits: int | None = None) -> None:
    """Turns, repeated prompts, edited answers, another beginning, an answer cut short: each as if read afresh."""
    memory, draw = Memory(decoder, ROOM, bits), random.Random(7)
    text = [draw.randrange(61) for _ in range(5)]
    for turn, change in enumerate(["next", "again", "next", "edited", "other", "next", "shorter"]):
        made = memory.continued(text, 6, sampling, seed=turn)
        answer = [next(made), next(made)] if change == "shorter" else list(made)
        assert answer == fresh(decoder, text, 6, sampling, seed=turn, bits=bits)[: len(answer)], change
        new = [draw.randrange(61) for _ in range(3)]
        text = {
            "next": [*text, *answer, *new],
            "again": text,
            "edited": [*text, *reversed(answer), *new],
            "other": new,
            "shorter": [*text, *answer, *new],
        }[change]
    assert list(memory.continued(text, 4, sampling)) == fresh(decoder, text, 4, sampling, bits=bits)


@pytest.mark.parametrize("attention", ["gated_delta"])
def test_every_attention_resumes_where_it_has_read(make: Callable[..., Decoder], attention: str) -> None:
    turns(make(attention=attention), Sampling(0))


@pytest.mark.parametrize("position", ["yarn"])
def test_every_kind_of_position_resumes(make: Callable[..., Decoder], position: str) -> None:
    turns(make(position=position), Sampling(0))


def test_window_that_has_wrapped_returns_to_the_prompt(make: Callable[..., Decoder]) -> None:
    turns(make(attention={"name": "sliding_window", "window": 4}), Sampling(0))


def test_draws_are_those_of_a_fresh_reading(make: Callable[..., Decoder]) -> None:
    turns(make(attention="mla"), Sampling(0.8, top_k=5, top_p=0.9, repetition_penalty=1.3))


def test_codes_resume(make: Callable[..., Decoder]) -> None:
    turns(make(), Sampling(0), bits=4)


def test_only_what_is_new_is_read(make: Callable[..., Decoder]) -> None:
    decoder = make()
    memory = Memory(decoder, ROOM)
    text = [5, 3, 8]
    answer = list(memory.continued(text, 4, Sampling(0)))
    assert memory.n_read == 3
    list(memory.continued(text, 4, Sampling(0)))
    assert memory.n_read == 0
    text = [*text, *answer, 9, 9]
    list(memory.continued(text, 4, Sampling(0)))
    assert memory.n_read == 3  # the last token of the answer was drawn and never read
    text = [*text, 1]
    list(memory.continued(text, 4, Sampling(0)))
    assert memory.n_read == 1  # the answer was left out, so the caches return to the prompt
    list(memory.continued([5, 3, 7], 4, Sampling(0)))
    assert memory.n_read == 3


def test_stop_token_ends_a_continuation(make: Callable[..., Decoder]) -> None:
    decoder = make()
    memory, whole = Memory(decoder, ROOM), fresh(decoder, [5, 3, 8], 6)
    stop = whole[3]
    assert list(memory.continued([5, 3, 8], 6, Sampling(0), stop_tokens={stop})) == whole[: whole.index(stop)]
    text = [5, 3, 8, *whole[: whole.index(stop)], stop, 4]
    assert list(memory.continued(text, 5, Sampling(0))) == fresh(decoder, text, 5)


@pytest.mark.parametrize(("attention", "at"), [("mla", 1), ("gated_delta", 2)])
def test_interrupted_reading_is_forgotten(make: Callable[..., Decoder], attention: str, at: int) -> None:
    decoder = make(attention=attention)
    memory, text = Memory(decoder, ROOM), [5, 3, 8]
    answer = list(memory.continued(text, 4, Sampling(0)))
    text = [*text, *answer, 7, 7]
    layer, calls = decoder.layers[-1], []

    def interrupted(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupted)  # the first layer has stored the token already
    with pytest.raises(KeyboardInterrupt):
        list(memory.continued(text, 4, Sampling(0)))
    hook.remove()
    assert len(calls) == at
    assert list(memory.continued(text, 4, Sampling(0))) == fresh(decoder, text, 4)


def test_prompt_read_in_chunks_resumes(make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    turns(make(), Sampling(0))


def test_texts_that_do_not_fit_are_refused_before_anything_is_read(make: Callable[..., Decoder]) -> None:
    memory = Memory(make(), 8)
    for prompt, n, says in ([[], 1, "at least one token"], [[1] * 5, 4, "the caches hold 8"]):
        with pytest.raises(BlockError, match=says):
            memory.continued(prompt, n)
    with pytest.raises(BlockError, match="has positions for"):
        Memory(make(position="learned"), 10**6)
    assert len(list(memory.continued([1] * 5, 3))) == 3
    assert torch.is_grad_enabled()
