"""Logits that are not finite: they end the request concerned with an error of its own, and no other."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from running import ROOM, Running, alone, running, tiny

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.generate import Continuations

SOUND, N = tiny(), 16
# Of the 257 tokens, one that the text of the first has, not in its first half, and those of the others have not.
DIVERGES, *OTHERS = ({"model": "tiny", "prompt": "abc"[i % 3 :], "max_tokens": N, "seed": i} for i in range(4))


def tokens(body: dict[str, Any]) -> list[int]:
    """Those of a request, prompt and text."""
    prompt = list(body["prompt"].encode())
    rows = Continuations(SOUND, [prompt], N, seed=body["seed"], stop_tokens={256})
    return prompt + [token for (token,) in rows if token is not None]


@pytest.fixture(scope="module")
def overflows() -> int:
    text, others = tokens(DIVERGES), {token for body in OTHERS for token in tokens(body)}
    return next(t for t in text[N // 2 : -1] if t not in others and t not in text[: N // 2])


def poisoned(tensor: str, value: float, overflows: int) -> Decoder:
    """The model, with numbers that are not finite for a token."""
    decoder = copy.deepcopy(SOUND)
    with torch.no_grad():
        decoder.get_parameter(tensor)[overflows] = value
    return decoder


@pytest.fixture(scope="module")
def server(overflows: int) -> Iterator[Running]:
    """Its model's numbers overflow once it has read a token."""
    decoder = poisoned("embedding.weight", math.inf, overflows)
    with running(Batch(decoder, 3, ROOM), decoder) as made:
        yield made


def test_a_text_that_diverges_ends_its_request_and_no_other(server: Running) -> None:
    for stream in (False, True):
        bodies = [*OTHERS[:2], {**DIVERGES, "stream": stream}, *OTHERS[2:]]
        with ThreadPoolExecutor(len(bodies)) as clients:
            answers = list(clients.map(lambda body: server.ask("/v1/completions", body), bodies))
        status, answer = answers.pop(2)
        if stream:
            *events, last = [json.loads(event[6:]) for event in answer.split("\n\n")[:-1]]
            begun = "".join(event["choices"][0]["text"] for event in events)
            whole = alone(SOUND, DIVERGES["prompt"], N)
            assert status == 200 and "[DONE]" not in answer and len(begun) > 3
            assert whole.startswith(begun.rstrip("\ufffd")) and begun != whole
            answer = last
        else:
            assert status == 500
        assert (answer["error"]["code"], answer["error"]["type"]) == ("not_finite", "server_error")
        for body, (code, text) in zip(OTHERS, answers, strict=True):
            assert (code, text["choices"][0]["text"]) == (200, alone(SOUND, body["prompt"], N, body["seed"]))
        server.idle()
    assert server.ask("/health")[0] == 200


def test_a_prompt_that_diverges_is_answered_with_500_and_its_likelihoods_are_none(
    server: Running, overflows: int
) -> None:
    for more in ({}, {"logprobs": 2}, {"stream": True}, {"n": 2}):
        status, answer = server.ask("/v1/completions", {"model": "tiny", "prompt": [97, overflows], **more})
        assert (status, answer["error"]["code"]) == (500, "not_finite")
    assert server.ask("/v1/completions", OTHERS[0])[0] == 200


def test_every_request_to_a_model_that_has_diverged_fails_by_itself(overflows: int) -> None:
    decoder = poisoned("head.weight", math.nan, overflows)
    with running(Batch(decoder, 2, ROOM), decoder) as server:
        for body in OTHERS[:2]:
            status, answer = server.ask("/v1/completions", {**body, "temperature": 0})
            assert (status, answer["error"]["code"]) == (500, "not_finite")
        assert server.ask("/health")[0] == 200
