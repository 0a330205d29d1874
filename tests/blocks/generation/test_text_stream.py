"""Tokens as text that can be shown: bytes here, so that every character of more than one is broken on the way."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from blockwright.blocks.generation.text_stream import BROKEN, TextStream


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


# Tokenizers by how they decode: byte by byte; tokens of several bytes, which may begin and end within a character; a
# byte-level BPE; bytes for what is not in the vocabulary, where a run of them is whole or broken as one.
Decode = Callable[[Sequence[int]], str]
Encode = Callable[[str, random.Random], list[int]]


def in_parts() -> tuple[Decode, Encode]:
    known: list[bytes] = []

    def encode(text: str, draw: random.Random) -> list[int]:
        data, ids = text.encode(), []
        while data:
            n = draw.choice([1, 1, 2, 3, 5])
            known.append(data[:n])
            ids.append(len(known) - 1)
            data = data[n:]
        return ids

    return lambda ids: b"".join(known[i] for i in ids).decode(errors="replace"), encode


def with_fallback() -> tuple[Decode, Encode]:
    """As of Llama 2: a blank in front is dropped, special tokens have no text."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken("<s>", special=True)])
    return made.decode, lambda text, draw: interspersed(made.encode(f" {text}").ids, made.token_to_id("<s>"), draw)


def byte_level() -> tuple[Decode, Encode]:
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>", special=True)])
    return made.decode, lambda text, draw: interspersed(made.encode(text).ids, 256, draw)


def interspersed(ids: Sequence[int], special: int, draw: random.Random) -> list[int]:
    return [each for i in ids for each in [*[special] * draw.choice([0, 0, 0, 1, 5]), i]]


KINDS = {
    "bytes": (decode, lambda text, draw: list(text.encode())),
    "parts": in_parts(),
    "byte-level": byte_level(),
    "fallback": with_fallback(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text_of_all_tokens_if_none_of_it_is_broken(kind: str) -> None:
    of_kind, encode = KINDS[kind]

    also = "" if kind == "fallback" else BROKEN  # what is broken there takes its neighbours with it

    @given(st.text("ab \u00e9\u4e2d\U0001f642" + also, max_size=24), st.randoms(use_true_random=False))
    @settings(max_examples=25)
    def test(text: str, draw: random.Random) -> None:
        ids = encode(text, draw)
        stream = TextStream(of_kind)
        seen = [stream.push(i) for i in ids]
        assert "".join([*seen, stream.close()]) == of_kind(ids) == text

    test()


@pytest.mark.parametrize("kind", KINDS)
def test_broken_text_is_held_back_for_three_tokens_at_linear_work(kind: str) -> None:
    of_kind, _ = KINDS[kind]
    broken = {"parts": 0, "fallback": 1 + 0x80, "bytes": 0x80}.get(kind)
    if kind == "parts":
        broken = len(KINDS[kind][1]("\u4e2d" * 9, random.Random(1)))  # some id within a character
        broken = next(
            i for i in range(broken) if of_kind([i] * 9) == of_kind([i]) * 9 == BROKEN * len(of_kind([i])) * 9
        )
    elif broken is None:
        broken = next(i for i in range(256) if of_kind([i, i]) == BROKEN * 2)
    work = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal work
        work += len(ids)
        return of_kind(ids)

    stream, shown = TextStream(counted), ""
    for n in range(1, 300):
        shown += stream.push(broken)
        assert len(shown) >= (n - 3) * len(of_kind([broken]))
    assert shown + stream.close() == of_kind([broken] * 299) and work < 30 * 299


@given(st.binary(max_size=24))
def test_of_bytes_that_are_no_text_the_same_places_are_broken(data: bytes) -> None:
    def places(text: str) -> str:
        return re.sub(f"{BROKEN}+", BROKEN, text)

    assert places("".join(pieces(data)[0])) == places(decode(data))


def test_special_tokens_without_end_are_linear_work() -> None:
    work = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal work
        work += len(ids)
        return decode([i for i in ids if i < 256])

    for first in ([], [97], [0xF0]):
        stream, work = TextStream(counted), 0
        for i in [*first, *[256, 257] * 200]:
            stream.push(i)
        assert work < 10 * 400


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
