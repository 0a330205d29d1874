"""Texts as they stream: characters that span tokens, stop strings, likelihoods."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from running import Running

TEXT = "né 日本語 🙂🙃 \u200d👩‍👩‍👧 — ende"


def streamed(server: Running, **asked: Any) -> tuple[list[str], str | None]:
    """The pieces of a completion, and why it ended."""
    body = {"model": "tiny", "max_tokens": 100, "stream": True, **asked}
    status, text = server.ask("/v1/completions", body)
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    choices = [event["choices"][0] for event in events]
    return [choice["text"] for choice in choices], choices[-1]["finish_reason"]


@pytest.mark.parametrize("several", [1, 3])
def test_characters_that_span_tokens_stream_whole(echo: Callable[..., Running], several: int) -> None:
    server = echo(several=several)
    pieces, why = streamed(server, prompt=TEXT)
    assert "".join(pieces) == TEXT and why == "stop" and "\ufffd" not in "".join(pieces)
    status, whole = server.ask("/v1/completions", {"model": "tiny", "prompt": TEXT, "max_tokens": 100})
    assert (status, whole["choices"][0]["text"]) == (200, TEXT)
    assert whole["usage"]["completion_tokens"] == len(TEXT.encode())


def test_a_character_cut_by_the_length_is_given_as_incomplete(echo: Callable[..., Running]) -> None:
    pieces, why = streamed(echo(), prompt="日本", max_tokens=4)
    assert "".join(pieces) == "日\ufffd" and why == "length"


@pytest.mark.parametrize("several", [1, 5])
@pytest.mark.parametrize(
    ("stop", "n", "text", "why", "tokens"),
    [
        ("cd", 20, "ab", "stop", 4),  # across tokens
        ("xyz", 20, "abcdef", "stop", 6),  # never: the end of the text
        ("fgh", 6, "abcdef", "length", 6),  # begun, and let go at the length
        ("def", 6, "abc", "stop", 6),  # with the last token
        ("d", 4, "abc", "stop", 4),
        ("a", 20, "", "stop", 1),
        ("éf", 20, "abcdef", "stop", 6),
    ],
)
def test_stop_strings(
    echo: Callable[..., Running], stop: str, n: int, text: str, why: str, tokens: int, several: int
) -> None:
    server = echo(several=several)
    asked = {"prompt": "abcdef", "max_tokens": n, "stop": stop}
    pieces, reason = streamed(server, **asked)
    assert ("".join(pieces), reason) == (text, why)
    _, whole = server.ask("/v1/completions", {"model": "tiny", **asked})
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (text, why)
    assert whole["usage"]["completion_tokens"] == tokens
    server.idle()


def test_a_text_that_a_stop_string_ends_leaves_its_row_to_the_next(echo: Callable[..., Running]) -> None:
    server = echo(rows=1, pause=0.01)
    asked = {"model": "tiny", "prompt": ["a" * 100, "b" * 20], "max_tokens": 60, "stop": "a"}
    _, whole = server.ask("/v1/completions", asked)
    assert [choice["text"] for choice in whole["choices"]] == ["", "b" * 20]
    server.idle()
    assert server.batch.steps < 50  # 20 for the second, and a few of the first


def test_ignore_eos_leaves_what_the_request_itself_ends_at(
    echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = echo().served
    monkeypatch.setattr(type(served.writer.words), "special_words", {"<|turn|>": 7})
    assert served.ends([], chat=True, ignored=True) == frozenset() != served.ends([], chat=True)
    for ignored in (False, True):
        assert 7 in served.ends(["<|turn|>", "other"], chat=True, ignored=ignored)
    assert served.ends(["<|turn|>"], chat=True, ignored=True) == {7}
