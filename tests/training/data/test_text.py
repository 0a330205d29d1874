"""Text files: what is a document, who gets which, and one clear error for each mistake."""

from __future__ import annotations

import contextlib
import random
import re
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockwright.registry.errors import ConfigError
from blockwright.training.data import pieces
from blockwright.training.data.corpus import SPLITS
from blockwright.training.data.text import TextFiles, _first_of_shuffle, assign


def write(folder: Path, **texts: str | bytes) -> None:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def splits(corpus: TextFiles) -> dict[str, list[str]]:
    return {split: list(corpus.documents(split)) for split in SPLITS}


# ---- documents and splits


def test_with_ten_files_whole_files_are_held_out(tmp_path):
    write(tmp_path, **{f"t{i:02}": f"text number {i}\n" for i in range(20)})
    parts = splits(TextFiles(f"{tmp_path}/*.txt", val_fraction=0.1, test_fraction=0.1))
    assert [len(parts[split]) for split in SPLITS] == [16, 2, 2]
    assert sorted(chain(*parts.values())) == sorted(f"text number {i}\n" for i in range(20))


def test_the_division_depends_on_its_own_seed_only(tmp_path):
    write(tmp_path, **{f"t{i:02}": f"text number {i}\n" for i in range(20)})
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


def test_no_held_out_split_is_made_when_none_is_wanted(tmp_path):
    write(tmp_path, a="one\ntwo\n")
    corpus = TextFiles(f"{tmp_path}/a.txt", val_fraction=0, test_fraction=0)
    corpus.check()
    assert splits(corpus) == {"train": ["one\ntwo\n"], "val": [], "test": []}


def test_files_named_twice_count_once_and_come_in_sorted_order(tmp_path):
    write(tmp_path, b="b", a="a")
    corpus = TextFiles([f"{tmp_path}/b.txt", f"{tmp_path}/*.txt"], val_fraction=0, test_fraction=0)
    assert list(corpus.documents("train")) == ["a", "b"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, a="home\n")
    assert list(TextFiles("~/a.txt", val_fraction=0, test_fraction=0).documents("train")) == ["home\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path, a=b"\xef\xbb\xbfhello\n")
    assert list(TextFiles(f"{tmp_path}/a.txt", val_fraction=0, test_fraction=0).documents("train")) == ["hello\n"]


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


# ---- mistakes


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        TextFiles(*args, **kwargs).check()
    return str(caught.value)


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path):
    write(tmp_path, moby_dick="Call me Ishmael.\n", emma="Emma Woodhouse\n")
    message = refusal(f"{tmp_path}/mobydick.txt")
    assert re.search(r"^data\.corpus\.files = .*no such file.*Did you mean 'moby_dick.txt'", message)


def test_a_missing_folder_is_refused_with_the_nearest_name(tmp_path):
    (tmp_path / "books").mkdir()
    for missing in ("a.txt", "*.txt"):
        message = refusal(f"{tmp_path}/boks/{missing}")
        assert "Did you mean 'books'" in message and f"there is no folder {tmp_path}/boks" in message


def test_a_pattern_without_a_match_is_refused_with_what_is_there(tmp_path):
    write(tmp_path, emma="Emma Woodhouse\n")
    assert re.search(r"matches no file.*emma\.txt", refusal(f"{tmp_path}/*.text"))
    assert "matches no file" in refusal(f"{tmp_path}/*/deep/*.txt")
    (tmp_path / "bare").mkdir()
    assert "bare holds no file" in refusal(f"{tmp_path}/bare/*.txt")


def test_a_directory_is_refused_with_the_pattern_to_write(tmp_path):
    assert f"Name them: '{tmp_path}/**/*.txt'" in refusal(str(tmp_path))


def test_no_files_at_all_are_refused():
    assert "no file is named" in refusal([])


@pytest.mark.parametrize("text", ["", " \n\n "])
def test_an_empty_corpus_is_refused(tmp_path, text):
    write(tmp_path, a=text)
    assert re.search(r"^data\.corpus\.files = .*the files hold", refusal(f"{tmp_path}/a.txt"))


def test_bytes_that_are_not_utf8_are_refused_with_file_and_offset(tmp_path):
    write(tmp_path, a="fine\n", b=b"caf\xc3\xa9 and caf\xe9\n")
    message = refusal(f"{tmp_path}/*.txt")
    assert re.search(r"^data\.corpus\.files = '.*b\.txt': the byte 0xe9 at offset 13 is not UTF-8", message)


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
    monkeypatch.setattr("blockwright.training.data.text.QUICK_BYTES", 8)
    write(tmp_path, a=b"fine text, only later broken \xff")
    corpus = TextFiles(f"{tmp_path}/a.txt")
    corpus.check()
    assert not corpus.is_small()
    with pytest.raises(ConfigError, match="offset 29"):
        list(corpus.documents("train"))
    write(tmp_path, a="a long line, and no line end in it")
    with pytest.raises(ConfigError, match=r"^data\.corpus\.test_fraction"):
        list(TextFiles(f"{tmp_path}/a.txt").documents("test"))


@pytest.mark.parametrize("fraction", [-0.1, 1, 2.0])
@pytest.mark.parametrize("name", ["val_fraction", "test_fraction"])
def test_a_fraction_outside_0_to_1_is_refused(name, fraction):
    assert re.search(rf"^data\.corpus\.{name} = .*at least 0 and below 1", refusal("a.txt", **{name: fraction}))


def test_fractions_that_leave_nothing_to_train_on_are_refused(tmp_path):
    assert "nothing is left to train on" in refusal("a.txt", val_fraction=0.5, test_fraction=0.5)
    write(tmp_path, a="one line of text, and no line end before its end")
    assert re.search(r"^data\.corpus\.val_fraction = 0\.05: no text is left for the val", refusal(f"{tmp_path}/a.txt"))


def test_an_empty_separator_is_refused():
    assert refusal("a.txt", separator="").startswith("data.corpus.separator = ''")


@pytest.mark.parametrize(
    ("files", "separator", "path"), [("a.txt", 5, "separator"), (5, None, "files"), ({}, "", "files")]
)
def test_a_value_of_another_type_is_refused(files, separator, path):
    assert refusal(files, separator=separator).startswith(f"data.corpus.{path} = ")
