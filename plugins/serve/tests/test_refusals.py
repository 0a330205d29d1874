"""Requests that are wrong: each is one message of OpenAI's form, and nothing of it is left at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import Echo, Running, real, running, tiny

pytestmark = pytest.mark.xdist_group("serve")

TALK = [{"role": "user", "content": "a"}]
COMPLETION = {
    "{oops": (400, None),
    "[]": (400, None),
    '"text"': (400, None),
    "": (400, None),
    "\xff": (400, None),
    "[" * 100_000: (400, None),
    '{"a":' * 100 + "1" + "}" * 100: (400, None),
    '{"model": ' + "1" * 5000 + "}": (400, None),
}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model"),
    "a model that is no text": ({"model": ["tiny"]}, "model"),
    "no prompt": ({"prompt": None}, "prompt"),
    "an object as prompt": ({"prompt": {"a": 1}}, "prompt"),
    "an empty list": ({"prompt": []}, "prompt"),
    "an empty list of ids": ({"prompt": [[]]}, "prompt"),
    "texts and ids": ({"prompt": ["a", [1]]}, "prompt"),
    "ids below zero": ({"prompt": [-1]}, "prompt"),
    "ids that are no integers": ({"prompt": [1.5]}, "prompt"),
    "ids beyond any integer": ({"prompt": [10**30]}, "prompt"),
    "half a character": ({"prompt": "\ud800"}, "prompt"),
    "a prompt that the batch refuses": ({"prompt": [0, 1]}, "prompt"),
    "tokens as a text": ({"max_tokens": "5"}, "max_tokens"),
    "tokens as a truth": ({"max_tokens": True}, "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens"),
    "tokens beyond the room": ({"max_tokens": 10**18}, "max_tokens"),
    "a temperature that is no number": ({"temperature": "hot"}, "temperature"),
    "an infinite temperature": ({"temperature": float("inf")}, "temperature"),
    "no temperature at all": ({"temperature": float("nan")}, "temperature"),
    "a temperature that is no float": ({"temperature": 10**400}, "temperature"),
    "top_p of zero": ({"top_p": 0}, "top_p"),
    "top_k of zero": ({"top_k": 0}, "top_k"),
    "min_p above one": ({"min_p": 2}, "min_p"),
    "a penalty of zero": ({"repetition_penalty": 0}, "repetition_penalty"),
    "a penalty that is no float": ({"repetition_penalty": 10**400}, "repetition_penalty"),
    "a stream that is no truth": ({"stream": "yes"}, "stream"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "an unknown option": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    "five stops": ({"stop": ["a"] * 5}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "a long stop": ({"stop": "a" * 201}, "stop"),
    "stops that are no texts": ({"stop": [1]}, "stop"),
    "no copies": ({"n": 0}, "n"),
    "more copies than can wait": ({"prompt": ["a"] * 50, "n": 128}, "n"),
    "more prompts than can wait": ({"prompt": [[1]] * 20_000}, "prompt"),
    "a seed of 65 bits": ({"seed": 2**64}, "seed"),
    "logprobs beyond the most": ({"logprobs": 21}, "logprobs"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "a bias": ({"logit_bias": {"5": 10}}, "logit_bias"),
    "an echo": ({"echo": True}, "echo"),
    "the best of several": ({"best_of": 3}, "best_of"),
    "a suffix": ({"suffix": "b"}, "suffix"),
    "a presence penalty": ({"presence_penalty": 0.1}, "presence_penalty"),
    "half a character as a field": ({"\ud800": 1}, "\\ud800"),
    "prompts beyond the most": ({"prompt": ["a"] * 2049}, "prompt"),
    "a field of another server": ({"guided_json": {}}, "guided_json"),
}
CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": None}, "messages"),
    "an empty conversation": ({"messages": []}, "messages"),
    "messages that are no list": ({"messages": "a"}, "messages"),
    "a message that is no object": ({"messages": ["a"]}, "messages.0"),
    "no role": ({"messages": [{"content": "a"}]}, "messages.0.role"),
    "an unknown role": ({"messages": [*TALK, {"role": "tool", "content": "a"}]}, "messages.1.role"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]},
        "messages.0.content.type",
    ),
    "a part that is no object": ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.type"),
    "a call of a tool": ({"messages": [{**TALK[0], "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
    "a name": ({"messages": [{**TALK[0], "name": "me"}]}, "messages.0.name"),
    "an empty text": ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    "a schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "two lengths": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    "likeliest without likelihoods": ({"top_logprobs": 3}, "top_logprobs"),
    "sound": ({"modalities": ["audio"]}, "modalities"),
    "a choice of tools": ({"tool_choice": "required"}, "tool_choice"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Echo(), tiny()) as made:
        yield made


def check(server: Running, path: str, body: Any, param: str | None, status: int = 400) -> None:
    code, answer = server.ask(path, body)
    assert code == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert 0 < len(error["message"]) < 500 and error["type"] == "invalid_request_error"
    assert server.engine.failed is None and server.engine.waiting == server.engine.running == 0


@pytest.mark.parametrize("text", COMPLETION, ids=range(len(COMPLETION)))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_no_request_is_refused(server: Running, text: str, path: str) -> None:
    status, param = COMPLETION[text]
    check(server, path, text.encode("latin-1"), param, status)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_refused_by_name(server: Running, name: str, stream: bool) -> None:
    change, param = FIELDS[name]
    if name == "options without a stream" and stream:
        change = {"stream_options": "x"}
    check(server, "/v1/completions", {"model": "tiny", "prompt": "a", "stream": stream, **change}, param)


@pytest.mark.parametrize("name", CHATS)
def test_a_wrong_chat_is_refused_by_name(server: Running, name: str) -> None:
    change, param = CHATS[name]
    check(server, "/v1/chat/completions", {"model": "tiny", "messages": TALK, **change}, param)


def test_fields_that_ask_for_nothing_are_taken(server: Running) -> None:
    nothing = {"user": "me", "metadata": {"a": "b"}, "store": False, "frequency_penalty": 0.0, "logit_bias": {}}
    nothing |= {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": None, "n": 1}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], **nothing}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "abc"


def test_a_model_without_chat_format_says_so(echo: Callable[..., Running]) -> None:
    server = echo()
    object.__setattr__(server.served, "chat", None)
    check(server, "/v1/chat/completions", {"model": "tiny", "messages": TALK}, "messages")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/nothing", 404),
        ("/v1/completions/x", 404),
        ("/v1/completions/", 404),
        ("/%0d%0aa", 404),
        ("/v1/models/other", 404),
    ],
)
def test_what_is_not_served_is_404_in_json(server: Running, path: str, status: int) -> None:
    code, answer = server.ask(path)
    assert code == status and answer["error"]["type"] == "not_found_error"


def test_other_methods_and_types_are_refused(server: Running) -> None:
    assert server.ask("/v1/completions")[0] == 405
    assert server.ask("/v1/models", {})[0] == 405
    for headers in ({"Content_Type": "text/plain"}, {"Content_Encoding": "gzip"}):
        code, answer = server.ask("/v1/completions", {"model": "tiny", "prompt": "a"}, **headers)
        assert code == 415 and "error" in answer


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_p"])
def test_numbers_at_the_edge_of_their_type_fail_no_model(name: str) -> None:
    """They are served, or refused by name."""
    batch = real()
    with running(batch, batch.decoder) as server:
        for value in (5e-324, 1e-300, 1e-9, 1.0, 1e9, 1e39, 1e308):
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 5, "ignore_eos": True, name: value}
            status, answer = server.ask("/v1/completions", body)
            assert answer["usage"]["completion_tokens"] == 5 if status == 200 else answer["error"]["param"] == name
        assert server.ask("/health")[0] == 200


def test_a_failed_model_is_said_everywhere(echo: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    server = echo()
    server.batch.open.clear()
    connection = server.send("/v1/completions", {"model": "tiny", "prompt": "abc", "stream": True})
    server.until(lambda: server.engine.waiting == 1)
    server.batch.fault = RuntimeError("broken")
    server.batch.open.set()
    assert connection.recv(100).startswith(b"HTTP/1.1 500")
    connection.close()
    assert server.ask("/health") == (503, "failed\n")
    code, answer = server.ask("/v1/completions", {"model": "tiny", "prompt": "abc"})
    assert code == 503 and answer["error"]["code"] == "model_failed"
    assert server.engine.waiting == server.engine.running == 0 and "broken" in caplog.text


def test_marks_of_pictures_are_refused_where_the_model_reads_some(
    echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = echo()
    body = {"model": "tiny", "prompt": "a <image>"}
    assert server.ask("/v1/completions", body)[0] == 200  # of a model without, it is a word
    monkeypatch.setattr(type(server.decoder), "inputs", {"images": None})
    check(server, "/v1/completions", body, "prompt")
    talk = [{"role": "user", "content": "<image>"}]
    check(server, "/v1/chat/completions", {"model": "tiny", "messages": talk}, "messages")
