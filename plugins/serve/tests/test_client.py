"""What the real ``openai`` client gets: texts, streams, usage, stops, copies, chats, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import torch
from running import Running, alone

from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("serve")  # one server for all

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 20, "seed": 3, "temperature": 0.8}
TALK: list[Any] = [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=60) as made:
        yield made


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "blockwright"


def test_a_completion_is_the_text_that_the_prompt_gives_alone(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(**ASKED)
    text = answer.choices[0].text
    assert text == alone(server.decoder, "Hello", 20, 3, 0.8)
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage and (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 20, 25)
    ids = client.completions.create(**{**ASKED, "prompt": [list(b"Hello")] * 2})
    assert [choice.text for choice in ids.choices] == [text] * 2
    greedy = [client.completions.create(**{**ASKED, "temperature": 0, "seed": s}).choices[0].text for s in (1, 2)]
    assert greedy == [alone(server.decoder, "Hello", 20, 0, 0)] * 2
    assert client.completions.create(**ASKED, extra_body={"top_k": 1}).choices[0].text == greedy[0]
    penalised = client.completions.create(**{**ASKED, "temperature": 0}, extra_body={"repetition_penalty": 5.0})
    assert penalised.choices[0].text != greedy[0]


def test_every_copy_of_every_prompt_has_a_seed_of_its_own(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(**{**ASKED, "prompt": ["Hello", "other prompt"], "n": 2})
    alones = [alone(server.decoder, p, 20, s, 0.8) for p in ("Hello", "other prompt") for s in (3, 4)]
    assert [choice.text for choice in answer.choices] == alones and len(set(alones)) == 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage and answer.usage.prompt_tokens == len("Hello") + len("other prompt")  # each read once
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 1, "prompt": ["Hello"] * 2, "n": 2}
    texts = [choice.text for _ in range(2) for choice in client.completions.create(**asked).choices]
    assert len(set(texts)) == 8  # without a seed


def test_a_stream_gives_the_same_text_and_its_usage_last_if_asked(client: openai.OpenAI, server: Running) -> None:
    chunks = list(client.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == alone(server.decoder, "Hello", 20, 3, 0.8)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None} and len(chunks) > 5
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens == 20
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1
    assert all(c.choices and c.usage is None for c in client.completions.create(**ASKED, stream=True))


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(client: openai.OpenAI, server: Running) -> None:
    whole = alone(server.decoder, "Hello", 60, 3, 0.8)
    stop = whole[12:14]
    asked = {**ASKED, "max_tokens": 60, "stop": ["never", stop]}
    choice = client.completions.create(**asked).choices[0]
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True)) == choice.text


def reference(server: Running, prompt: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T,V] of the tokens that follow a prompt, in one pass."""
    with torch.inference_mode():
        return server.decoder(torch.tensor([[*prompt.encode(), *ids]]))[0, len(prompt) - 1 : -1].log_softmax(-1)


def ids_of(names: list[str]) -> list[int]:
    return [int(name[9:]) if name.startswith("token_id:") else name.encode()[0] for name in names]


def test_likelihoods_of_a_completion_are_those_of_one_pass(client: openai.OpenAI, server: Running) -> None:
    choice = client.completions.create(**ASKED, logprobs=3).choices[0]
    found = choice.logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    ids = ids_of(found.tokens)
    expected = reference(server, "Hello", ids)
    assert Bytes().decode(ids) == choice.text and len(ids) == 20
    torch.testing.assert_close(torch.tensor(found.token_logprobs), expected[range(20), ids], atol=1e-4, rtol=0)
    for likeliest, row in zip(found.top_logprobs, expected, strict=True):
        assert ids_of(list(likeliest)) == row.topk(3).indices.tolist()
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("token_id:") or choice.text[offset] == token
    assert found.text_offset == sorted(found.text_offset)


def test_likelihoods_of_a_chat_come_with_a_stream_too(client: openai.OpenAI, server: Running) -> None:
    asked = {**CHAT, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2).choices[0].logprobs
    assert whole and whole.content
    expected = reference(server, "Be kind. Hi", ids_of([each.token for each in whole.content]))
    for each, row in zip(whole.content, expected, strict=True):
        assert [likely.logprob for likely in each.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
        assert each.bytes == (None if each.token.startswith("token_id:") else list(each.token.encode()))
    stream = client.chat.completions.create(**asked, top_logprobs=2, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in stream]
    assert [each for piece in pieces if piece for each in piece.content or ()] == whole.content
    without = client.chat.completions.create(**asked).choices[0].logprobs
    assert without and without.content and all(each.top_logprobs == [] for each in without.content)


def test_a_chat_is_the_text_of_its_messages(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(**CHAT)
    message = answer.choices[0].message
    assert message.content == alone(server.decoder, "Be kind. Hi", 12, 1)
    assert message.role == "assistant" and answer.object == "chat.completion"
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind. "}]}]
    rest = {"model": "tiny", "messages": [*parts, TALK[1]], "max_completion_tokens": 12, "seed": 1}
    assert client.chat.completions.create(**rest).choices[0].message.content == message.content
    history = [*TALK, message.model_dump(), {"role": "user", "content": "And?"}]  # sent back
    assert client.chat.completions.create(**{**CHAT, "messages": history}).choices
    with client.chat.completions.stream(**CHAT) as stream:  # the client's own helper
        kinds = {event.type for event in stream}
    choice = stream.current_completion_snapshot.choices[0]
    assert choice.message.content == message.content and "content.delta" in kinds
    assert choice.finish_reason == answer.choices[0].finish_reason
    copies = [choice.message.content for choice in client.chat.completions.create(**CHAT, n=2).choices]
    texts = ["", ""]
    for chunk in client.chat.completions.create(**CHAT, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == copies and copies[0] == message.content
    room = client.chat.completions.create(model="tiny", messages=TALK, extra_body={"ignore_eos": True})
    assert room.usage and room.usage.total_tokens == 200 and room.choices[0].finish_reason == "length"


MISTAKES: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str]] = [
    ({"model": "x"}, openai.NotFoundError, "model", "model_not_found"),
    ({"temperature": -1, "stream": True}, openai.BadRequestError, "temperature", "invalid_value"),
    ({"prompt": "a" * 700}, openai.BadRequestError, "prompt", "context_length_exceeded"),
    ({"max_tokens": 700, "stream": True}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
    ({"extra_body": {"foo": 1}}, openai.BadRequestError, "foo", "unsupported_parameter"),
]


def test_a_mistake_raises_the_clients_error_with_the_field(client: openai.OpenAI) -> None:
    for change, error, param, code in MISTAKES:
        with pytest.raises(error) as raised:
            client.completions.create(**{**ASKED, **change})
        assert (raised.value.param, raised.value.code) == (param, code)


def test_concurrent_streams_each_get_the_text_that_they_get_alone(server: Running) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        asked: dict[str, Any] = {"prompt": "p" * (i % 7 + 1), "max_tokens": 12 + i % 5, "seed": i, "temperature": 0.8}
        stream = await client.completions.create(model="tiny", **asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(6)))

    assert asyncio.run(many()) == [alone(server.decoder, "p" * (i % 7 + 1), 12 + i % 5, i, 0.8) for i in range(6)]


def test_a_key_is_needed_where_there_is_one(echo: Callable[..., Running]) -> None:
    server = echo(key="secret")
    for key in ("other", "secre", "secrets"):
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=server.url, api_key=key) as client:
            client.models.list()
    with openai.OpenAI(base_url=server.url, api_key="secret") as client:
        assert client.completions.create(model="tiny", prompt="abc").choices[0].text == "abc"
    assert server.ask("/health") == (200, "ok\n") and server.ask("/")[0] == 200
    assert server.ask("/metrics")[0] == server.ask("/v1/nothing")[0] == 401


def test_the_client_tries_again_when_the_queue_is_full(echo: Callable[..., Running]) -> None:
    server = echo(rows=1, queue=1)
    server.batch.open.clear()
    first = [server.send({"prompt": "abc"}) for _ in range(2)]
    server.until(lambda: server.engine.waiting == 2)
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model="tiny", prompt="abc")
        assert int(raised.value.response.headers["retry-after"]) >= 1 and raised.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError) as never:
            client.completions.create(model="tiny", prompt="abc", n=3)
        assert never.value.param == "n"
    threading.Timer(0.3, server.batch.open.set).start()
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=3) as client:
        assert client.completions.create(model="tiny", prompt="abc").choices[0].text == "abc"
    for connection in first:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
