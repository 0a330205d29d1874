"""A server that drafts: its texts are those without drafts, and its metrics count what became of the drafts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from running import ROOM, Running, alone, real, running, tiny
from test_metrics import values

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts import Drafter, Lookup, MultiToken, SmallerModel

KINDS: dict[str, Callable[[Decoder], Drafter]] = {
    "mtp": MultiToken,
    "lookup": lambda decoder: Lookup(3),
    "an equal model": lambda decoder: SmallerModel(tiny(), 2),
}


def asked(i: int) -> dict[str, Any]:
    """Request i: prompts that repeat themselves, of several lengths and samplings."""
    text = {"prompt": "abcabcabcab"[i % 5 :] * (1 + i % 3), "max_tokens": 20 + 7 * (i % 4)}
    return {"model": "tiny", **text, "seed": i, "temperature": (0, 0.9)[i % 2]}


def streamed(server: Running, body: dict[str, Any]) -> str:
    return "".join(choice["text"] for choice in server.stream(**body))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_whole_answers_are_those_without_drafts(kind: str) -> None:
    decoder = tiny()
    if kind == "mtp":
        decoder = compose({**decoder.config, "mtp": {"depth": 2}}, seed=3).double().eval()
    bodies = [asked(i) for i in range(6)]
    with running(Batch(decoder, 3, ROOM, drafts=KINDS[kind](decoder)), decoder) as server:
        with ThreadPoolExecutor(6) as clients:
            texts = list(clients.map(lambda body: streamed(server, body), bodies))
        for body, text in zip(bodies, texts, strict=True):
            assert text == alone(server.decoder, body["prompt"], body["max_tokens"], body["seed"], body["temperature"])
        _, whole = server.ask("/v1/completions", {**bodies[0], "logprobs": 1})
    assert whole["choices"][0]["text"] == texts[0]
    made = whole["usage"]["completion_tokens"]
    assert len(whole["choices"][0]["logprobs"]["token_logprobs"]) == made <= bodies[0]["max_tokens"]


def test_right_drafts_save_steps_and_are_counted() -> None:
    batch = real(drafts=SmallerModel(tiny(), 2))
    with running(batch, batch.decoder) as server:
        _, answer = server.ask("/v1/completions", asked(2) | {"max_tokens": 31, "ignore_eos": True})
        found = values(server)
    assert answer["usage"]["completion_tokens"] == 31 and found["blockwright_steps_total"] == 10  # of three tokens
    assert found["blockwright_accepted_tokens_total"] == found["blockwright_drafted_tokens_total"] == 20


def test_a_hang_up_within_drafts_leaves_nothing_and_drafts_are_counted() -> None:
    batch = real(drafts=Lookup(4))
    with running(batch, batch.decoder) as server:
        for stream in (True, False):
            steps = batch.steps
            connection = server.send(asked(2) | {"max_tokens": 150, "stream": stream})
            server.until(lambda steps=steps: batch.steps > steps + 3)
            connection.close()
            server.idle()
        assert streamed(server, asked(1)) == alone(server.decoder, asked(1)["prompt"], 27, 1, 0.9)
        found, acceptance = values(server), batch.acceptance
    assert found["blockwright_drafted_tokens_total"] == acceptance.drafted > 0
    assert found["blockwright_accepted_tokens_total"] == acceptance.accepted <= acceptance.drafted
