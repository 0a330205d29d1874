"""Text files: what is a document, who gets which, and one clear error for each mistake."""

from __future__ import annotations

import contextlib
import random
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockwright.registry.errors import ConfigError
from blockwright.training.data import pieces
from blockwright.training.data.corpus import SPLITS, TextFiles, _first_of_shuffle, assign


def write(folder: Path, **texts: str | bytes) -> None:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def splits(corpus: TextFiles) -> dict[str, list[str]]:
    return {split: list(corpus.documents(split)) for split in SPLITS}


def test_with_ten_files_whole_files_are_held_out_by_a_seed_of_their_own(tmp_path):
    write(tmp_path, **{f"t{i:02}": f"text number {i}\n" for i in range(20)})
    parts = splits(TextFiles(f"{tmp_path}/*.txt", val_fraction=0.1, test_fraction=0.1))
    assert [len(parts[split]) for split in SPLITS] == [16, 2, 2]
    assert sorted(chain(*parts.values())) == sorted(f"text number {i}\n" for i in range(20))
    pattern = f"{tmp_path}/*.txt"
    assert splits(TextFiles(pattern)) == splits(TextFiles(pattern))
    assert splits(TextFiles(pattern)) != splits(TextFiles(pattern, split_seed=1))


def test_with_few_files_the_tail_of_each_is_held_out_at_line_starts(tmp_path):
    lines = [f"line {i}\n" for i in range(100)]
    write(tmp_path, a="".join(lines), b="".join(lines[::-1]))
    parts = splits(TextFiles(f"{tmp_path}/*.txt", val_fraction=0.1, test_fraction=0.2))
    for i in range(2):
        assert all(parts[split][i].startswith("line ") and parts[split][i].endswith("\n") for split in SPLITS)
    assert parts["train"][0] + parts["val"][0] + parts["test"][0] == "".join(lines)
    assert [parts[split][0].count("\n") for split in SPLITS] == pytest.approx([70, 10, 20], abs=1)


def test_a_separator_makes_documents_within_a_file(tmp_path):
    write(tmp_path, a="<s>".join(f"\nstory {i}\n" for i in range(12)) + "<s>\n")
    parts = splits(TextFiles(f"{tmp_path}/a.txt", separator="<s>"))
    assert sorted(chain(*parts.values())) == sorted(f"story {i}" for i in range(12))


def test_files_count_once_in_sorted_order_a_tilde_is_the_home_and_a_byte_order_mark_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, b="one\ntwo\n", a=b"\xef\xbb\xbfhello\n")
    corpus = TextFiles(["~/b.txt", f"{tmp_path}/*.txt"], val_fraction=0, test_fraction=0)
    corpus.check()
    assert splits(corpus) == {"train": ["hello\n", "one\ntwo\n"], "val": [], "test": []}


def test_the_fingerprint_follows_content_and_options_and_not_the_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, a="text\n" * 9)
    here, there = f"{tmp_path}/one/a.txt", f"{tmp_path}/two/a.txt"
    known = TextFiles(here).fingerprint()
    assert TextFiles(there).fingerprint() == known
    assert TextFiles(here, val_fraction=0.1).fingerprint() != known
    assert TextFiles(here, split_seed=1).fingerprint() != known
    write(tmp_path / "one", a="text\n" * 8 + "test\n")  # as long as before
    assert TextFiles(here).fingerprint() != known


def test_a_shuffle_is_the_one_of_the_whole_list():
    for n, k, seed in ((10, 1, 0), (10, 10, 3), (37, 5, 1), (3000, 300, 2)):
        assert _first_of_shuffle(n, k, seed) == random.Random(seed).sample(range(n), n)[:k]


@given(st.integers(10, 300), st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 9))
def test_every_wanted_split_gets_documents(n, val, test, seed):
    parts = [SPLITS[part] for part in assign(n, val, test, seed)]
    assert len(parts) == n and "train" in parts
    assert ("val" in parts) == (val > 0) and ("test" in parts) == (test > 0)
    assert parts.count("val") <= max(1, n * val) and parts.count("test") <= max(1, n * test)


TEXTS = st.lists(st.text("ab \n|\r\u00e9\u2028\ufeff\U0001f40b", max_size=30), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    TEXTS,
    st.sampled_from([None, "|", "\n", "ab|", "\u2028"]),
    st.floats(0, 0.49),
    st.floats(0, 0.49),
    st.integers(1, 9),
)
def test_reading_in_pieces_divides_text_as_reading_it_whole(tmp_path, monkeypatch, texts, separator, val, test, block):
    monkeypatch.setattr(pieces, "BLOCK", block)
    for file in tmp_path.iterdir():
        file.unlink()
    write(tmp_path, **{f"t{i:02}": text for i, text in enumerate(texts)})
    corpus = TextFiles(f"{tmp_path}/*.txt", separator, val, test)
    for split in SPLITS:
        found = []
        with contextlib.suppress(ConfigError):
            found.extend(corpus.documents(split))
        assert found == whole(texts, separator, val, test, split)


def whole(texts, separator, val, test, split) -> list[str]:
    """The documents of a split, from texts that are held in memory: the definition."""
    texts = [text.removeprefix("\ufeff") for text in texts]
    if separator is not None:
        texts = [piece.strip("\n") for text in texts for piece in text.split(separator) if piece.strip()]
    if len(texts) >= 10:
        texts = [
            text for text, part in zip(texts, assign(len(texts), val, test, 0), strict=True) if SPLITS[part] == split
        ]
    else:
        texts = [tail(text, split, val, test) for text in texts]
    return [text for text in texts if text]


def tail(text, split, val, test) -> str:
    def line_start(fraction: float) -> int:
        at = round(len(text) * fraction)
        newline = text.find("\n", at - 1)
        return at if not 0 < at < len(text) else newline + 1 if newline >= 0 else len(text)

    begin, end = line_start(1 - val - test), line_start(1 - test)
    return {"train": text[:begin], "val": text[begin:end], "test": text[end:]}[split]


# Files → what is asked for, the setting at fault, and a value that the message has to name
MISTAKES = [
    ({"moby_dick": "Call me.\n", "emma": "Emma\n"}, {"files": "TMP/mobydick.txt"}, "files", "moby_dick.txt"),
    ({}, {"files": "TMP/boks/a.txt"}, "files", "books"),
    ({}, {"files": "TMP/boks/*.txt"}, "files", "books"),
    ({"emma": "Emma\n"}, {"files": "TMP/*.text"}, "files", "emma.txt"),
    ({"emma": "Emma\n"}, {"files": "TMP/*/deep/*.txt"}, "files", ""),
    ({}, {"files": "TMP/books/*.txt"}, "files", ""),
    ({}, {"files": "TMP"}, "files", "TMP/**/*.txt"),
    ({}, {"files": []}, "files", ""),
    ({"a": ""}, {"files": "TMP/a.txt"}, "files", ""),
    ({"a": " \n\n "}, {"files": "TMP/a.txt"}, "files", ""),
    ({"a": "fine\n", "b": b"caf\xc3\xa9 and caf\xe9\n"}, {"files": "TMP/*.txt"}, "files", "0xe9 at offset 13"),
    ({"a": "one line of text, and no line end before its end"}, {"files": "TMP/a.txt"}, "val_fraction", ""),
    *(({}, {"files": "a.txt", "val_fraction": value}, "val_fraction", "") for value in (-0.1, 1, 2.0)),
    ({}, {"files": "a.txt", "test_fraction": 1}, "test_fraction", ""),
    ({}, {"files": "a.txt", "val_fraction": 0.5, "test_fraction": 0.5}, "val_fraction", ""),
    ({}, {"files": "a.txt", "separator": ""}, "separator", ""),
    ({}, {"files": "a.txt", "separator": 5}, "separator", ""),
    ({}, {"files": 5}, "files", ""),
    ({}, {"files": {}, "separator": ""}, "files", ""),
]


@pytest.mark.parametrize(("texts", "settings", "path", "named"), MISTAKES)
def test_a_mistake_is_refused_by_its_path(tmp_path, texts, settings, path, named):
    (tmp_path / "books").mkdir()
    write(tmp_path, **texts)
    put = {k: v.replace("TMP", str(tmp_path)) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(ConfigError) as caught:
        TextFiles(**put).check()
    assert caught.value.path == f"data.corpus.{path}" and named.replace("TMP", str(tmp_path)) in str(caught.value)


def test_a_character_cut_by_a_block_is_not_called_broken(tmp_path, monkeypatch):
    write(tmp_path, a="aé\U0001f40b\r\n", b=b"a\xc3", c=b"ab\xe2\x82")
    for block in range(1, 9):
        monkeypatch.setattr(pieces, "BLOCK", block)
        assert "".join(pieces.read(tmp_path / "a.txt")) == "aé\U0001f40b\r\n"
        assert "".join(pieces.read(tmp_path / "a.txt", 2)) == "a"
        for name, offset in (("b", 1), ("c", 2)):
            with pytest.raises(ConfigError, match=f"at offset {offset} is not UTF-8"):
                list(pieces.read(tmp_path / f"{name}.txt"))


def test_a_large_corpus_is_checked_by_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr("blockwright.training.data.corpus.QUICK_BYTES", 8)
    write(tmp_path, a=b"fine text, only later broken \xff")
    corpus = TextFiles(f"{tmp_path}/a.txt")
    corpus.check()
    assert not corpus.is_small()
    with pytest.raises(ConfigError, match="offset 29"):
        list(corpus.documents("train"))
    write(tmp_path, a="a long line, and no line end in it")
    with pytest.raises(ConfigError, match=r"^data\.corpus\.test_fraction"):
        list(TextFiles(f"{tmp_path}/a.txt").documents("test"))
