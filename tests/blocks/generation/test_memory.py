"""A text that is continued again and again gives the tokens of a fresh reading, and reads only what is new."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation import generate as module
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.memory import Memory
from blockwright.blocks.generation.sample import Sampling
from blockwright.registry import BlockError

ROOM, GREEDY = 64, Sampling(0)


def fresh(decoder: Decoder, prompt: list[int], n: int, sampling: Sampling = GREEDY, **more: Any) -> list[int]:
    return [token for (token,) in Continuations(decoder, [prompt], n, sampling, **more) if token is not None]


def turns(decoder: Decoder, sampling: Sampling, bits: int | None) -> None:
    """Turns, repeated prompts, edited answers, another beginning, an answer cut short: each as if read afresh."""
    memory, draw = Memory(decoder, ROOM, bits), random.Random(7)
    text = [draw.randrange(61) for _ in range(5)]
    for turn, change in enumerate(["next", "again", "edited", "other", "next", "shorter"]):
        made = memory.continued(text, 6, sampling, seed=turn)
        answer = [next(made), next(made)] if change == "shorter" else list(made)
        assert answer == fresh(decoder, text, 6, sampling, seed=turn, bits=bits)[: len(answer)], change
        new = [draw.randrange(61) for _ in range(3)]
        changed = {"again": text, "edited": [*text, *reversed(answer), *new], "other": new}
        text = changed.get(change, [*text, *answer, *new])
    assert list(memory.continued(text, 4, sampling)) == fresh(decoder, text, 4, sampling, bits=bits)


@pytest.mark.parametrize(
    ("model", "sampling", "bits", "chunk"),
    [
        ({"attention": "gated_delta"}, GREEDY, None, None),
        ({"position": "yarn"}, GREEDY, None, 2),  # a prompt that is read in chunks
        ({"attention": {"name": "sliding_window", "window": 4}}, GREEDY, None, None),  # which has wrapped
        ({"attention": "mla"}, Sampling(0.8, top_k=5, top_p=0.9, repetition_penalty=1.3), None, None),
        ({}, GREEDY, 4, None),
    ],
    ids=str,
)
def test_text_resumes_where_it_has_been_read(
    make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, model: Any, sampling: Sampling, bits: Any, chunk: Any
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk or module.CHUNK)
    turns(make(**model), sampling, bits)


def test_only_what_is_new_is_read(make: Callable[..., Decoder]) -> None:
    memory, text, answer = Memory(make(), ROOM), [5, 3, 8], list[int]()

    def read(text: list[int]) -> int:
        answer[:] = memory.continued(text, 4, GREEDY)
        return memory.n_read

    assert [read(text), read(text)] == [3, 0]
    text = [*text, *answer, 9, 9]
    assert read(text) == 3  # the last token of the answer was drawn and never read
    assert read([*text, 1]) == 1  # the answer was left out, so the caches return to the prompt
    assert read([5, 3, 7]) == 3


def test_stop_token_ends_a_continuation(make: Callable[..., Decoder]) -> None:
    decoder = make()
    memory, whole = Memory(decoder, ROOM), fresh(decoder, [5, 3, 8], 6)
    until = whole[: whole.index(whole[3])]
    assert list(memory.continued([5, 3, 8], 6, GREEDY, stop_tokens={whole[3]})) == until
    text = [5, 3, 8, *until, whole[3], 4]
    assert list(memory.continued(text, 5, GREEDY)) == fresh(decoder, text, 5)


@pytest.mark.parametrize(("attention", "at"), [("mla", 1), ("gated_delta", 2)])
def test_interrupted_reading_is_forgotten(make: Callable[..., Decoder], attention: str, at: int) -> None:
    decoder = make(attention=attention)
    memory, text = Memory(decoder, ROOM), [5, 3, 8]
    text = [*text, *memory.continued(text, 4, GREEDY), 7, 7]
    calls: list[int] = []

    def interrupted(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    hook = decoder.layers[-1].register_forward_pre_hook(interrupted)  # the first layer has stored the token already
    with pytest.raises(KeyboardInterrupt):
        list(memory.continued(text, 4, GREEDY))
    hook.remove()
    assert len(calls) == at and list(memory.continued(text, 4, GREEDY)) == fresh(decoder, text, 4)


def test_texts_that_do_not_fit_are_refused_before_anything_is_read(make: Callable[..., Decoder]) -> None:
    memory = Memory(make(), 8)
    for refused in (
        lambda: memory.continued([], 1),
        lambda: memory.continued([1] * 5, 4),
        lambda: Memory(make(position="learned"), 10**6),
    ):
        with pytest.raises(BlockError):
            refused()
    assert len(list(memory.continued([1] * 5, 3))) == 3 and torch.is_grad_enabled()
