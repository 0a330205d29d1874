"""Packing: the stream comes back from its windows, targets stay within documents, the cache survives its writers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.registry.errors import ConfigError
from blockwright.training import claims
from blockwright.training.data import packing
from blockwright.training.data.packing import Stream, cache_key, cut, line, load, pack, ring
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars

EOS = 256
documents = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=8)


def stream_of(texts: list[list[int]]) -> Stream:
    """A stream that lies in memory."""
    tokens = [token for text in texts for token in [*text, EOS]]
    starts = np.cumsum([0, *[len(text) + 1 for text in texts]])[:-1]
    stream = Stream(Path("nowhere"), "uint16", starts, len(tokens), EOS)
    stream.__dict__["tokens"] = np.array(tokens, dtype=np.uint16)
    return stream


def slow_window(texts: list[list[int]], places: list[int]) -> dict[str, list[int]]:
    """What ``cut`` says of one window, token by token."""
    tokens = [token for text in texts for token in [*text, EOS]]
    document_of = [i for i, text in enumerate(texts) for _ in [*text, EOS]]
    is_start = [j == 0 for text in texts for j in range(len(text) + 1)]
    row = {"tokens": [], "targets": [], "segments": [], "positions": [], "n_bytes": 0}
    for t, place in enumerate(places[:-1]):
        follows = places[t + 1]
        row["tokens"].append(tokens[place] if place >= 0 else EOS)
        is_new = t > 0 and (is_start[place] if place >= 0 else places[t - 1] >= 0)
        row["segments"].append(-1 if place < 0 else 0 if t == 0 else row["segments"][-1] + is_new)
        row["positions"].append(0 if t == 0 or is_new else row["positions"][-1] + 1)
        within = place >= 0 and follows >= 0 and document_of[place] == document_of[follows] and tokens[place] != EOS
        row["targets"].append(tokens[follows] if within else -100)
        row["n_bytes"] += within and tokens[follows] != EOS
    return row


@settings(max_examples=40)
@given(
    documents, st.integers(1, 9), st.lists(st.integers(0, 200), min_size=1, max_size=4), st.sampled_from([ring, line])
)
def test_a_batch_is_what_the_slow_reading_says(texts, length, offsets, places_of):
    stream = stream_of(texts)
    offsets = np.array([offset % stream.n_tokens for offset in offsets])
    length = min(length, stream.n_tokens - 1)
    if length < 1:
        return
    places = places_of(offsets, length + 1, stream.n_tokens)
    batch = cut(stream, places, Bytes().token_bytes())
    for b, row in enumerate(places.tolist()):
        assert {name: values[b].tolist() for name, values in batch.items()} == slow_window(texts, row)


@settings(max_examples=40)
@given(documents, st.integers(1, 9), st.integers(0, 200))
def test_the_stream_comes_back_from_the_windows_of_a_line_and_of_a_ring(texts, length, first):
    stream = stream_of(texts)
    windows = -(-(stream.n_tokens - 1) // length)
    places = line(np.arange(windows) * length, length + 1, stream.n_tokens)
    batch = cut(stream, places, Bytes().token_bytes())
    # Every token but the last is an input once; every token but each document's first is a target once.
    flat = batch["tokens"].ravel()[: stream.n_tokens - 1]
    assert flat.tolist() == stream.tokens[:-1].tolist()
    targets = batch["targets"][batch["targets"] != -100]
    assert targets.tolist() == [token for text in texts for token in [*text[1:], EOS]]
    assert batch["n_bytes"].sum() == sum(len(text) - 1 for text in texts)
    empty = cut(stream, line(np.array([-1]), 5, 4), Bytes().token_bytes())
    assert (empty["targets"] == -100).all() and empty["n_bytes"].tolist() == [0] and (empty["segments"] == -1).all()
    first %= stream.n_tokens
    n = stream.n_tokens // length
    offsets = (first + np.arange(n) * length) % stream.n_tokens
    tokens = cut(stream, ring(offsets, length + 1, stream.n_tokens), Bytes().token_bytes())["tokens"].ravel()
    assert tokens.tolist() == np.roll(stream.tokens, -first)[: n * length].tolist()


@pytest.fixture
def packed(tmp_path, small_corpus):
    tokenizer = Bytes()
    key = cache_key(small_corpus.fingerprint(), tokenizer)
    return pack(small_corpus, tokenizer, tmp_path, key), tmp_path / key


def test_documents_lie_end_to_end_each_with_its_eos(packed, small_corpus):
    stream = packed[0].streams["train"]
    texts = list(small_corpus.documents("train"))
    assert stream.tokens.tolist() == [token for text in texts for token in [*text.encode(), EOS]]
    assert stream.starts.tolist() == [151 * i for i in range(7)]
    assert isinstance(stream.tokens, np.memmap) and stream.tokens.dtype == np.uint16
    wide = pack(small_corpus, Bytes(2**16 + 1), packed[1].parent, "wide").streams["train"]
    assert wide.tokens.dtype == np.uint32 and wide.n_tokens == 1057


def test_the_second_run_reads_no_text(packed, small_corpus, monkeypatch):
    _, folder = packed
    monkeypatch.setattr(Bytes, "encode", None)
    assert pack(small_corpus, Bytes(), folder.parent, folder.name).streams["val"].n_tokens == 162


def test_a_learned_vocabulary_is_of_the_train_split_alone_and_kept_beside_its_tokens(tmp_path, small_corpus, memory):
    for tokenizer in (Chars(64), BPE(270)):
        first = pack(small_corpus, tokenizer, tmp_path, tokenizer.kind)
        assert tokenizer.fitted
        again = pack(small_corpus, type(tokenizer)(tokenizer.vocab_size), tmp_path, tokenizer.kind)
        assert again.vocabulary == first.vocabulary == tokenizer.to_json()
    tokenizer = Chars(64)
    pack(memory(["abc"], ["xyz"], ["uvw"]), tokenizer, tmp_path, "alone")
    assert tokenizer.characters == "abc"


HARMS = {
    "cut a file": lambda folder: os.truncate(folder / "train.bin", 100),
    "lose a file": lambda folder: (folder / "val.bin").unlink(),
    "lose the index": lambda folder: (folder / "index.json").unlink(),
    "break the index": lambda folder: (folder / "index.json").write_text(json.dumps({"dtype": "uint16"})),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_cache_is_made_anew(packed, small_corpus, harm):
    _, folder = packed
    HARMS[harm](folder)
    assert load(folder, EOS) is None
    anew = pack(small_corpus, Bytes(), folder.parent, folder.name)
    assert anew.streams["train"].tokens[:150].tobytes().decode("utf-16-le") == next(small_corpus.documents("train"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path, memory):
    with pytest.raises(ConfigError, match="vocab_size"):
        pack(memory(["abc"]), Chars(3), tmp_path, "failed")
    assert list(tmp_path.iterdir()) == []


def _pack_slowly(corpus, folder, key, barrier):
    class Slow(Bytes):
        def encode(self, text):
            time.sleep(0.01)
            return super().encode(text)

    write = packing._write
    packing._write = lambda *given: ((folder / f"built{os.getpid()}").touch(), write(*given))
    barrier.wait()
    packed = pack(corpus, Slow(), folder, key)
    assert packed.streams["train"].tokens.shape == (1057,)


def test_writers_at_once_make_one_good_cache(tmp_path, small_corpus):
    fork = multiprocessing.get_context("fork")
    (tmp_path / "key").mkdir()  # and a broken one is in the way
    (tmp_path / "key" / "train.bin").write_bytes(b"junk")
    barrier = fork.Barrier(4)
    writers = [fork.Process(target=_pack_slowly, args=(small_corpus, tmp_path, "key", barrier)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert load(tmp_path / "key", EOS)
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["built", "key"]  # one builds, the others wait


def test_what_a_killed_writer_left_is_swept(tmp_path, small_corpus):
    dead, living = claims.new_owner(), claims.new_owner()
    (tmp_path / f".{dead}.lock").touch()
    names = {f".key.{dead}": 0, f".key.{living}": 9, ".key.other-01234567-0123456789ab": 0, ".key.older": 2}
    for name, age in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.bin").write_bytes(b"half")
        for path in (tmp_path / name / "train.bin", tmp_path / name):
            os.utime(path, (time.time() - age * 86400,) * 2)
    with claims.claimed(tmp_path, living):
        pack(small_corpus, Bytes(), tmp_path, "key")
    assert {path.name for path in tmp_path.iterdir()} == {"key", f".key.{living}", ".key.other-01234567-0123456789ab"}


def test_a_cache_that_has_been_in_the_making_for_days_stays(tmp_path, small_corpus):
    making = tmp_path / ".key.older"
    making.mkdir()
    (making / "train.bin").write_bytes(b"half, and growing")
    os.utime(making, (time.time() - 3 * 86400,) * 2)
    pack(small_corpus, Bytes(), tmp_path, "key")
    assert making.exists()


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_refused_and_nothing_is_left(tmp_path, small_corpus):
    (tmp_path / "file").write_text("")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for cache, limit in ((tmp_path / "file" / "cache", soft), (tmp_path, 100)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(ConfigError) as refused:
                pack(small_corpus, Bytes(), cache, "key")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert refused.value.path == "data.cache_dir"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_stream_is_sent_to_a_process_without_its_tokens(packed):
    stream = packed[0].streams["train"]
    assert stream.tokens.size == 1057
    data = pickle.dumps(stream)
    assert len(data) < 1500
    assert pickle.loads(data).tokens.tolist() == stream.tokens.tolist()


def test_a_cache_is_written_as_it_always_was_and_another_format_has_another_key(packed, small_corpus, monkeypatch):
    digest = hashlib.sha256()
    for file in sorted(packed[1].iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    assert digest.hexdigest() == "fc555c6142b8dc9f81078777ecab6117d869cb6a21b4657aeb31fef6db9c3784"
    monkeypatch.setattr(packing, "FORMAT", packing.FORMAT + 1)
    assert cache_key(small_corpus.fingerprint(), Bytes()) != packed[1].name


def test_where_very_many_documents_begin_lies_in_a_file_of_its_own(tmp_path, small_corpus, monkeypatch):
    inline = pack(small_corpus, Bytes(), tmp_path, "inline").streams["train"]
    monkeypatch.setattr(packing, "INLINE_STARTS", 3)
    beside = pack(small_corpus, Bytes(), tmp_path, "beside").streams["train"]
    assert (tmp_path / "beside" / "train.starts").stat().st_size == 8 * 7
    assert (
        beside.starts.tolist()
        == inline.starts.tolist()
        == load(tmp_path / "beside", EOS).streams["train"].starts.tolist()
    )
    os.truncate(tmp_path / "beside" / "train.starts", 8)
    assert load(tmp_path / "beside", EOS) is None


def test_a_document_in_pieces_is_one_document_and_one_without_a_token_is_left_out(tmp_path, memory):
    class InPieces(memory):
        def streams(self, split):
            return (iter(text) for text in self.documents(split))

    for cls in (memory, InPieces):
        stream = pack(cls(["", "ab", "", "c"]), Bytes(), tmp_path, cls.__name__).streams["train"]
        assert stream.tokens.tolist() == [97, 98, EOS, 99, EOS] and stream.starts.tolist() == [0, 3]
    odd = "\u2028漢字 text<|endoftext|>\x00\r\n"
    stream = pack(memory([odd, odd]), Bytes(), tmp_path, "odd").streams["train"]
    assert Bytes().decode(stream.tokens) == odd * 2 and (stream.tokens == EOS).sum() == 2
