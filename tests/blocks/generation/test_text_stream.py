"""Tokens as text that can be shown: bytes here, so that every character of more than one is broken on the way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockwright.blocks.generation.text_stream import TextStream


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def spaced(ids: Sequence[int]) -> str:
    """A decoder that drops the blank in front, as SentencePiece's do."""
    return "".join(f" {chr(97 + i)}" for i in ids)[1:]


def pieces(text: bytes, stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream, seen = TextStream(decode, stops), []
    for token in text:
        seen.append(stream.push(token))
        if stream.ended:
            return [*seen, stream.close()], True
    return [*seen, stream.close()], stream.ended


@pytest.mark.parametrize("text", ["", "plain", "naïve café", "日本語", "🙂🙃 x", "a\n\nb"])
def test_pieces_add_up_to_the_text(text: str) -> None:
    assert "".join(pieces(text.encode())[0]) == text


def test_no_piece_shows_half_a_character() -> None:
    seen, _ = pieces("é🙂".encode())
    assert seen == ["", "é", "", "", "", "🙂", ""]


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    assert "".join(pieces(b"a\xf0\x9f")[0]) == "a\ufffd"


def test_text_that_depends_on_what_is_before_it_is_right() -> None:
    stream = TextStream(spaced)
    assert [stream.push(i) for i in (0, 1, 2)] == ["a", " b", " c"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello END more", ["END"], "hello "),
        ("hello ENding", ["END"], "hello ENding"),
        ("aab", ["ab"], "a"),
        ("xaaab", ["aab", "aaab"], "x"),
        ("one\ntwo", ["\n", "two"], "one"),
        ("END", ["END"], ""),
        ("to be continued E", ["END"], "to be continued E"),
        ("caf\u00e9 au", ["\u00e9"], "caf"),
        ("all of it", [""], "all of it"),
    ],
)
def test_stop_ends_the_text_before_itself(text: str, stops: list[str], expected: str) -> None:
    seen, ended = pieces(text.encode(), stops)
    assert "".join(seen) == expected
    assert ended == (expected != text)


def test_nothing_of_a_stop_is_ever_shown() -> None:
    seen, _ = pieces(b"say STOP", ["STOP"])
    assert seen[:4] == ["s", "a", "y", " "] and not any(seen[4:])


def test_first_of_several_stops_wins_even_in_one_token() -> None:
    stream = TextStream(lambda ids: "x B A y" * len(ids), ["A", "B"])
    assert stream.push(0) == "x " and stream.ended
