"""Requests that are wrong: each is one message of OpenAI's form, and nothing of it is left at work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from running import Echo, Running, real, running, tiny

from blockwright.plugins.serve import answer, body, engine, files, serving
from blockwright.registry.limits import MAX_DEPTH
from blockwright.training.data.chat import jinja as template

pytestmark = pytest.mark.xdist_group("serve")

ASKED = {"model": "tiny", "prompt": "ab", "max_tokens": 2}
USER = {"role": "user", "content": "a"}
NO_REQUESTS = ("{oops", "[]", '"text"', "", "\xff", "[" * 100_000, '{"a":' * 100 + "1" + "}" * 100)
NO_REQUESTS += ('{"model": ' + "1" * 5000 + "}",)
FIELDS: dict[str, list[Any]] = {  # of a completion → values that it cannot have
    "model": [None, ["tiny"]],
    "prompt": [None, {"a": 1}, [], [[]], ["a", [1]], [-1], [1.5], [10**30], "\ud800", "", [0, 1], [[1]] * 20_000,
               ["a"] * 2049],
    "max_tokens": ["5", True, 1.5, 0, 10**18],
    "temperature": ["hot", inf, nan, 10**400],
    "top_p": [0],
    "top_k": [0],
    "min_p": [2],
    "repetition_penalty": [0, 10**400],
    "stream": ["yes"],
    "stream_options": ["x"],
    "stop": [["a"] * 5, "", "a" * 201, [1]],
    "n": [0, 10**6],
    "seed": [2**64],
    "logprobs": [21],
    "tools": [[{"type": "function"}]],
    "functions": [[{"name": "f"}]],
    "logit_bias": [{"5": 10}],
    "echo": [True],
    "best_of": [3],
    "suffix": ["b"],
    "presence_penalty": [0.1],
    "frequency_penalty": [0.5],
    "guided_json": [{}],  # of another server
}  # fmt: skip
CHATS: list[tuple[str, dict[str, Any]]] = [
    *(("messages", {"messages": value}) for value in (None, [], "a", [{**USER, "content": ""}])),
    ("messages", {"messages": [{**USER, "content": "\ud800"}]}),
    ("messages.0", {"messages": ["a"]}),
    ("messages.0.role", {"messages": [{"content": "a"}]}),
    ("messages.1.role", {"messages": [USER, {"role": "tool", "content": "a"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": None}]}),
    ("messages.0.content.type", {"messages": [{**USER, "content": ["a"]}]}),
    ("messages.0.tool_calls", {"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}),
    ("messages.0.name", {"messages": [{**USER, "name": "me"}]}),
    ("response_format", {"response_format": {"type": "json_schema"}}),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("modalities", {"modalities": ["audio"]}),
    ("tool_choice", {"tool_choice": "required"}),
]


@pytest.fixture(scope="module")
def echoing() -> Iterator[Running]:
    with running(Echo(), tiny()) as made:
        yield made


def wrong(server: Running, path: str, body: Any, param: str | None, status: int = 400) -> str:
    """What is not as it should be; nothing of the request may be left."""
    code, answer = server.ask(path, body)
    assert server.engine.failed is None and server.engine.waiting == server.engine.running == 0
    error = answer.get("error", {})
    right = code == status and set(error) == {"message", "type", "param", "code"} and error["param"] == param
    right = right and 0 < len(error["message"]) < 500 and error["type"] == "invalid_request_error"
    return "" if right else f"{path} {str(body)[:99]}: {code} {answer}"


def test_a_wrong_request_is_refused_by_the_name_of_its_field(echoing: Running) -> None:
    paths = {"/v1/completions": ASKED, "/v1/chat/completions": {"model": "tiny", "messages": [USER]}}
    found = [wrong(echoing, path, text.encode("latin-1"), None) for text in NO_REQUESTS for path in paths]
    for i, (name, value) in enumerate((name, value) for name, values in FIELDS.items() for value in values):
        asked = {**ASKED, "stream": i % 2 == 0, name: value}
        found.append(wrong(echoing, "/v1/completions", asked, name))
    for param, change in (
        ("stream_options", {"stream_options": {"include_usage": True}}),  # without a stream
        ("stream_options.x", {"stream": True, "stream_options": {"x": 1}}),
        ("\\ud800", {"\ud800": 1}),
        ("n", {"prompt": ["a"] * 50, "n": 128}),  # more than can wait
    ):
        found.append(wrong(echoing, "/v1/completions", {**ASKED, **change}, param))
    for param, change in CHATS:
        asked = {**paths["/v1/chat/completions"], **change}
        found.append(wrong(echoing, "/v1/chat/completions", asked, param))
    assert [each for each in found if each] == []


def test_fields_that_ask_for_nothing_are_taken(echoing: Running) -> None:
    nothing = {"user": "me", "metadata": {"a": "b"}, "store": False, "frequency_penalty": 0.0, "logit_bias": {}}
    nothing |= {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": None, "n": 1}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], **nothing}
    status, answer = echoing.ask("/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "abc"


def test_other_paths_methods_and_types_are_refused_in_json(echoing: Running) -> None:
    for path in ("/v1/nothing", "/v1/completions/x", "/v1/completions/", "/%0d%0aa", "/v1/models/other"):
        code, answer = echoing.ask(path)
        assert code == 404 and answer["error"]["type"] == "not_found_error"
    assert echoing.ask("/v1/completions")[0] == echoing.ask("/v1/models", {})[0] == 405
    for headers in ({"Content_Type": "text/plain"}, {"Content_Encoding": "gzip"}):
        code, answer = echoing.ask("/v1/completions", ASKED, **headers)
        assert code == 415 and "error" in answer


def test_pages_of_other_sites_are_answered_nothing(echoing: Running) -> None:
    own, evil = f"127.0.0.1:{echoing.port}", f"evil.example:{echoing.port}"
    others = (
        {"Host": evil, "Origin": f"http://{evil}"},
        *({"Host": own, "Origin": o} for o in ("http://127.0.0.1:1", "null")),
    )
    for path in ("/", "/health", "/metrics", "/v1/models", "/v1/completions"):
        for headers in others:
            status, answer = echoing.ask(path, ASKED if path == "/v1/completions" else None, **headers)
            assert status == 403 and answer["error"]["code"] == "other_site"
    for site in (own, f"localhost:{echoing.port}", f"[::1]:{echoing.port}"):
        assert echoing.ask("/v1/completions", ASKED, Host=site, Origin=f"http://{site}")[0] == 200
    assert echoing.ask("/v1/completions", ASKED)[0] == 200
    assert echoing.ask("/v1/completions", ASKED, Host="a:80", Origin="https://a")[0] == 200  # an allowed host


def test_numbers_at_the_edge_of_their_type_are_served_or_refused_by_name_and_fail_no_model() -> None:
    batch = real()
    with running(batch, batch.decoder) as server:
        for name in ("temperature", "repetition_penalty", "top_p"):
            for value in (5e-324, 1e-300, 1e-40, 1e-9, 1e39, 1e308):
                body = {"model": "tiny", "prompt": "ab", "max_tokens": 2, "ignore_eos": True, name: value}
                status, answer = server.ask("/v1/completions", body)
                assert answer["usage"]["completion_tokens"] == 2 if status == 200 else answer["error"]["param"] == name
        assert server.ask("/health") == (200, "ok\n")


def test_a_failed_model_is_said_everywhere(echo: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    server = echo()
    server.batch.open.clear()
    connection = server.send({"prompt": "abc", "stream": True})
    server.until(lambda: server.engine.waiting == 1)
    server.batch.fault = RuntimeError("broken")
    server.batch.open.set()
    assert connection.recv(100).startswith(b"HTTP/1.1 500")
    connection.close()
    assert server.ask("/health") == (503, "failed\n")
    code, answer = server.ask("/v1/completions", {"model": "tiny", "prompt": "abc"})
    assert code == 503 and answer["error"]["code"] == "model_failed"
    assert server.engine.waiting == server.engine.running == 0 and "broken" in caplog.text


def test_a_chat_without_a_format_and_marks_of_pictures_are_refused(
    echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = echo()
    body, talk = {"model": "tiny", "prompt": "a <image>"}, [{"role": "user", "content": "<image>"}]
    assert server.ask("/v1/completions", body)[0] == 200  # of a model without pictures, it is a word
    monkeypatch.setattr(type(server.decoder), "inputs", {"images": None})
    assert not wrong(server, "/v1/completions", body, "prompt")
    assert not wrong(server, "/v1/chat/completions", {"model": "tiny", "messages": talk}, "messages")
    monkeypatch.undo()
    object.__setattr__(server.served, "chat", None)
    assert not wrong(server, "/v1/chat/completions", {"model": "tiny", "messages": talk}, "messages")


def test_limits_of_the_readme_are_those_of_the_code() -> None:
    """All numbers of its section in their order, but statuses and the 8 of UTF-8."""
    text = (Path(__file__).parent.parent / "README.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    numbers = [int(found.replace(",", "")) for found in re.findall(r"(?<![\w.+-])[\d,]*\d(?![\w.])", text)]
    mib = [body.LEAST / 2**20, body.OF_A_TOKEN, round(files.MOST_BYTES / 3 * 4 / 2**20), body.SECONDS, MAX_DEPTH]
    renders = [template.SECONDS, template.WITHIN, template.MEMORY / 2**30, template.START]
    expected = [answer.UNREAD, 2 * engine.AHEAD, serving.STALLED, serving.STALLED, *mib, *renders]
    assert [number for number in numbers if number not in (400, 403, 499, 500, 503)] == expected, numbers
