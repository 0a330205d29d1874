"""A server that drafts: its texts are those without drafts, and its metrics count what became of the drafts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from running import ROOM, Running, alone, real, running, tiny
from test_metrics import values

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts.base import Drafter
from blockwright.blocks.generation.drafts.lookup import Lookup
from blockwright.blocks.generation.drafts.model import SmallerModel
from blockwright.blocks.generation.drafts.mtp import MultiToken

pytestmark = pytest.mark.xdist_group("serve_drafts")

KINDS: dict[str, Callable[[Decoder], Drafter]] = {
    "mtp": MultiToken,
    "lookup": lambda decoder: Lookup(3),
    "an equal model": lambda decoder: SmallerModel(tiny(), 2),
}


def predicting() -> Decoder:
    """The tiny model with two depths of multi-token prediction."""
    return compose({**tiny().config, "mtp": {"depth": 2}}, seed=3).double().eval()


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    decoder = predicting() if request.param == "mtp" else tiny()
    batch = Batch(decoder, 3, ROOM, drafts=KINDS[request.param](decoder))
    with running(batch, decoder) as made:
        yield made


def asked(i: int) -> dict[str, Any]:
    """Request i: prompts that repeat themselves, of several lengths and samplings."""
    return {
        "model": "tiny",
        "prompt": "abcabcabcab"[i % 5 :] * (1 + i % 3),
        "max_tokens": 20 + 7 * (i % 4),
        "seed": i,
        "temperature": (0, 0.9)[i % 2],
    }


def streamed(server: Running, body: dict[str, Any]) -> str:
    status, text = server.ask("/v1/completions", {**body, "stream": True})
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    events = [json.loads(event[6:]) for event in text.split("\n\n")[:-2]]
    return "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.slow
def test_streams_and_whole_answers_are_those_without_drafts(server: Running) -> None:
    bodies = [asked(i) for i in range(10)]
    with ThreadPoolExecutor(10) as clients:
        texts = list(clients.map(lambda body: streamed(server, body), bodies))
    for body, text in zip(bodies, texts, strict=True):
        assert text == alone(server.decoder, body["prompt"], body["max_tokens"], body["seed"], body["temperature"])
    _, whole = server.ask("/v1/completions", {**bodies[0], "logprobs": 1})
    assert whole["choices"][0]["text"] == texts[0]
    made = whole["usage"]["completion_tokens"]
    assert len(whole["choices"][0]["logprobs"]["token_logprobs"]) == made <= bodies[0]["max_tokens"]


@pytest.mark.parametrize("server", ["lookup"], indirect=True)
def test_metrics_count_drafts(server: Running) -> None:
    server.ask("/v1/completions", asked(2) | {"max_tokens": 100})
    found, acceptance = values(server), server.batch.acceptance
    assert found["blockwright_drafted_tokens_total"] == acceptance.drafted > 0
    assert found["blockwright_accepted_tokens_total"] == acceptance.accepted <= acceptance.drafted


def test_right_drafts_save_steps() -> None:
    batch = real(drafts=SmallerModel(tiny(), 2))
    with running(batch, batch.decoder) as server:
        _, answer = server.ask("/v1/completions", asked(2) | {"max_tokens": 61, "ignore_eos": True})
        found = values(server)
    assert answer["usage"]["completion_tokens"] == 61 and found["blockwright_steps_total"] == 20  # of three tokens
    assert found["blockwright_accepted_tokens_total"] == found["blockwright_drafted_tokens_total"] == 40


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_within_drafts_leaves_nothing(stream: bool) -> None:
    batch = real(drafts=Lookup(4))
    with running(batch, batch.decoder) as server:
        connection = server.send("/v1/completions", asked(2) | {"max_tokens": 150, "stream": stream})
        server.until(lambda: batch.steps > 3)
        connection.close()
        server.idle()
        assert streamed(server, asked(1)) == alone(server.decoder, asked(1)["prompt"], 27, 1, 0.9)
