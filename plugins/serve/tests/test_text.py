"""Texts as they stream: characters that span tokens, and stop strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from running import Running

TEXT = "né 日本語 🙂🙃 \u200d👩‍👩‍👧 — ende"


def streamed(server: Running, **asked: Any) -> tuple[str, str | None]:
    """The text of a completion, and why it ended."""
    choices = server.stream(**asked)
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


@pytest.mark.parametrize("several", [1, 3])
def test_characters_that_span_tokens_stream_whole(echo: Callable[..., Running], several: int) -> None:
    server = echo(several=several)
    assert streamed(server, prompt=TEXT) == (TEXT, "stop")
    assert all("\ufffd" not in choice["text"] for choice in server.stream(prompt=TEXT))
    _, whole = server.ask("/v1/completions", {"model": "tiny", "prompt": TEXT, "max_tokens": 100})
    assert (whole["choices"][0]["text"], whole["usage"]["completion_tokens"]) == (TEXT, len(TEXT.encode()))
    assert streamed(server, prompt="日本", max_tokens=4) == ("日\ufffd", "length")


STOPS = [  # stop, most tokens: text, why it ended, tokens made
    ("cd", 20, "ab", "stop", 4),  # across tokens
    ("xyz", 20, "abcdef", "stop", 6),  # never: the end of the text
    ("fgh", 6, "abcdef", "length", 6),  # begun, and let go at the length
    ("def", 6, "abc", "stop", 6),  # with the last token
    ("d", 4, "abc", "stop", 4),
    ("a", 20, "", "stop", 1),
    ("éf", 20, "abcdef", "stop", 6),
]


@pytest.mark.parametrize("several", [1, 5])
def test_stop_strings(echo: Callable[..., Running], several: int) -> None:
    server = echo(several=several)
    for stop, n, text, why, tokens in STOPS:
        asked = {"prompt": "abcdef", "max_tokens": n, "stop": stop}
        assert streamed(server, **asked) == (text, why), stop
        _, whole = server.ask("/v1/completions", {"model": "tiny", **asked})
        choice = whole["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, why), stop
        assert whole["usage"]["completion_tokens"] == tokens, stop
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
    assert 7 in served.ends(["<|turn|>", "other"], chat=True)
    assert served.ends(["<|turn|>"], chat=True, ignored=True) == {7}
