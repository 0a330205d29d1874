"""Tokens as text that can be shown: bytes here, so that every character of more than one is broken on the way."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from blockwright.blocks.generation.generate import BROKEN, TextStream


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


def test_pieces_add_up_to_the_text_and_none_shows_half_a_character() -> None:
    for text in ("", "plain", "naïve café", "日本語", "🙂🙃 x", "a\n\nb"):
        assert "".join(pieces(text.encode())[0]) == text
    assert pieces("é🙂".encode())[0] == ["", "é", "", "", "", "🙂", ""]
    assert "".join(pieces(b"a\xf0\x9f")[0]) == "a\ufffd"  # what never becomes a character is shown at the end
    stream = TextStream(spaced)  # a text that depends on what is before it
    assert [stream.push(i) for i in (0, 1, 2)] == ["a", " b", " c"]


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
        ids, stream = encode(text, draw), TextStream(of_kind)
        seen = [stream.push(i) for i in ids]
        assert "".join([*seen, stream.close()]) == of_kind(ids) == text

    test()


class Counted:
    """A decoder, and how many tokens it was given."""

    def __init__(self, of: Decode) -> None:
        self.of, self.work = of, 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.work += len(ids)
        return self.of(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_text_is_held_back_for_three_tokens_at_linear_work(kind: str) -> None:
    of_kind, encode = KINDS[kind]
    ids = encode("\u4e2d" * 9, random.Random(1)) if kind == "parts" else range(256)
    shown = {i: of_kind([i]) for i in ids}
    broken = next(i for i, one in shown.items() if one and of_kind([i] * 9) == one * 9 == BROKEN * len(one) * 9)
    counted, text = Counted(of_kind), ""
    stream = TextStream(counted)
    for n in range(1, 300):
        text += stream.push(broken)
        assert len(text) >= (n - 3) * len(shown[broken])
    assert text + stream.close() == of_kind([broken] * 299) and counted.work < 30 * 299


@given(st.binary(max_size=24))
def test_of_bytes_that_are_no_text_the_same_places_are_broken(data: bytes) -> None:
    seen, whole = (re.sub(f"{BROKEN}+", BROKEN, text) for text in ("".join(pieces(data)[0]), decode(data)))
    assert seen == whole


def test_special_tokens_without_end_are_linear_work() -> None:
    for first in ([], [97], [0xF0]):
        counted = Counted(lambda ids: decode([i for i in ids if i < 256]))
        stream = TextStream(counted)
        for i in [*first, *[256, 257] * 200]:
            stream.push(i)
        assert counted.work < 10 * 400


STOPS: list[tuple[str, list[str], str]] = [
    ("hello END more", ["END"], "hello "),
    ("hello ENding", ["END"], "hello ENding"),
    ("aab", ["ab"], "a"),
    ("xaaab", ["aab", "aaab"], "x"),
    ("one\ntwo", ["\n", "two"], "one"),
    ("END", ["END"], ""),
    ("to be continued E", ["END"], "to be continued E"),
    ("caf\u00e9 au", ["\u00e9"], "caf"),
    ("all of it", [""], "all of it"),
]


def test_stop_ends_the_text_before_itself_and_nothing_of_it_is_ever_shown() -> None:
    for text, stops, expected in STOPS:
        seen, ended = pieces(text.encode(), stops)
        assert "".join(seen) == expected and ended == (expected != text), text
    seen, _ = pieces(b"say STOP", ["STOP"])
    assert seen[:4] == ["s", "a", "y", " "] and not any(seen[4:])
    stream = TextStream(lambda ids: "x B A y" * len(ids), ["A", "B"])  # the first of several, even in one token
    assert stream.push(0) == "x " and stream.ended
