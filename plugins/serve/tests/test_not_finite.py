"""Logits that are not finite: they end the request concerned with an error of its own, and no other."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from running import ROOM, Running, alone, running, tiny

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.generate import Continuations

SOUND, N = tiny(), 24


def tokens(body: dict[str, Any]) -> list[int]:
    """Those of a request, prompt and text."""
    prompt = list(body["prompt"].encode())
    rows = Continuations(SOUND, [prompt], N, seed=body["seed"], stop_tokens={256})
    return prompt + [token for (token,) in rows if token is not None]


def asked(seed: int) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "abc"[seed % 3 :] * (1 + seed % 4), "max_tokens": N, "seed": seed}


class Case(NamedTuple):
    """A request, a token that its text has and its first half has not, and requests whose texts have it not."""

    diverges: dict[str, Any]
    overflows: int
    others: list[dict[str, Any]]


@pytest.fixture(scope="module")
def case() -> Case:
    diverges = next(body for body in map(asked, range(100)) if len(set(tokens(body))) > N)
    overflows = tokens(diverges)[-3]
    others = (body for body in map(asked, range(100, 200)) if overflows not in tokens(body))
    return Case(diverges, overflows, list(itertools.islice(others, 4)))


def poisoned(tensor: str, value: float, overflows: int) -> Decoder:
    """The model, with numbers that are not finite for a token."""
    decoder = copy.deepcopy(SOUND)
    with torch.no_grad():
        decoder.get_parameter(tensor)[overflows] = value
    return decoder


@pytest.fixture(scope="module")
def server(case: Case) -> Iterator[Running]:
    """Its model's numbers overflow once it has read a token."""
    decoder = poisoned("embedding.weight", math.inf, case.overflows)
    with running(Batch(decoder, 3, ROOM), decoder) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_diverges_ends_its_request_and_no_other(server: Running, case: Case, stream: bool) -> None:
    diverges, others = case.diverges, case.others
    bodies = [*others[:3], {**diverges, "stream": stream}, *others[3:]]
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = list(clients.map(lambda body: server.ask("/v1/completions", body), bodies))
    status, answer = answers.pop(3)
    if stream:
        *events, last = [json.loads(event[6:]) for event in answer.split("\n\n")[:-1]]
        pieces = [event["choices"][0]["text"] for event in events]
        whole = alone(SOUND, diverges["prompt"], N)
        assert status == 200 and "[DONE]" not in answer and len("".join(pieces)) > 3
        assert whole.startswith("".join(pieces).rstrip("\ufffd")) and "".join(pieces) != whole
        answer = last
    else:
        assert status == 500
    assert (answer["error"]["code"], answer["error"]["type"]) == ("not_finite", "server_error")
    for body, (code, text) in zip(others, answers, strict=True):
        assert (code, text["choices"][0]["text"]) == (200, alone(SOUND, body["prompt"], N, body["seed"]))
    server.idle()
    assert server.ask("/health")[0] == 200


def test_a_prompt_that_diverges_is_answered_with_500_and_its_likelihoods_are_none(server: Running, case: Case) -> None:
    for more in ({}, {"logprobs": 2}, {"stream": True}, {"n": 2}):
        status, answer = server.ask("/v1/completions", {"model": "tiny", "prompt": [97, case.overflows], **more})
        assert (status, answer["error"]["code"]) == (500, "not_finite")
    assert server.ask("/v1/completions", case.others[0])[0] == 200


def test_every_request_to_a_model_that_has_diverged_fails_by_itself(case: Case) -> None:
    decoder = poisoned("head.weight", math.nan, case.overflows)
    with running(Batch(decoder, 2, ROOM), decoder) as server:
        for body in case.others[:2]:
            status, answer = server.ask("/v1/completions", {**body, "temperature": 0})
            assert (status, answer["error"]["code"]) == (500, "not_finite")
        assert server.ask("/health")[0] == 200
