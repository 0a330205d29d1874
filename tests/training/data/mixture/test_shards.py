"""Shards of every format give the same tokens and documents; a damaged or unclear one is refused by its file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockwright.registry.errors import ConfigError
from blockwright.training.data.mixture.shards import Reading, Shard, open_shard
from blockwright.training.data.mixture.tokens import Line, Rings, Shards, Stretch
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import EOS, documents, flat

PATH = "data.sources.web.files"
READING = Reading(PATH, EOS)
DOCS = documents(40)
WRITTEN: dict[str, Callable[[Path], Shard]] = {
    "raw": lambda folder: open_shard(formats.raw(folder / "a.bin", DOCS), Reading(PATH, EOS, dtype="uint16")),
    "olmo": lambda folder: open_shard(
        formats.raw(folder / "a.npy", DOCS, "uint32"), Reading(PATH, EOS, dtype="uint32")
    ),
    "npy": lambda folder: open_shard(formats.npy(folder / "a.npy", DOCS), READING),
    "megatron_eod": lambda folder: open_shard(formats.megatron(folder / "a.bin", DOCS, eod=True), READING),
    "megatron_int32": lambda folder: open_shard(formats.megatron(folder / "a.bin", DOCS, True, 4, "int32"), READING),
    "datatrove": lambda folder: open_shard(formats.datatrove(folder / "a.ds", DOCS), READING),
    "datatrove_wide": lambda folder: open_shard(formats.datatrove(folder / "a.ds", DOCS, 4), READING),
}
UNMARKED: dict[str, Callable[[Path], Shard]] = {
    "megatron": lambda folder: open_shard(formats.megatron(folder / "a.bin", DOCS), READING),
    "datatrove": lambda folder: open_shard(formats.datatrove(folder / "a.ds", DOCS, eos=False), READING),
}


def begins(shard: Shard, first: int, last: int) -> list[int]:
    ids = shard.ids(first, last)
    return (np.flatnonzero(shard.borders.begins(ids, first)) + first).tolist()


def starts(docs: list[list[int]], extra: int) -> list[int]:
    return np.cumsum([0, *(len(doc) + extra for doc in docs)]).tolist()


@pytest.mark.parametrize("name", WRITTEN)
def test_ids_and_documents_of_every_format(name, tmp_path):
    shard = WRITTEN[name](tmp_path)
    assert shard.ids(0, shard.n_tokens).tolist() == flat(DOCS)
    assert begins(shard, 0, shard.n_tokens) == starts(DOCS, 1)[:-1]
    assert begins(shard, 30, 200)[:1] == [place for place in starts(DOCS, 1) if place > 30][:1]
    assert len(pickle.dumps(shard)) < 2000  # it goes to a loader process without its tokens
    assert begins(pickle.loads(pickle.dumps(shard)), 0, 300) == begins(shard, 0, 300)


@pytest.mark.parametrize("name", UNMARKED)
def test_documents_without_ends_are_those_of_the_index(name, tmp_path):
    shard = UNMARKED[name](tmp_path)
    expected = starts(DOCS, 0)[:-1]
    assert begins(shard, 0, shard.n_tokens) == expected
    for first in (1, 17, 100):
        within = [place for place in expected if first <= place < first + 90]
        assert [place for place in begins(shard, first, first + 90) if place > first] == [
            p for p in within if p > first
        ]


@pytest.mark.parametrize(("magic", "dtype"), [(20240520, "uint16"), (20240801, "uint32")])
def test_documents_of_llm_c_begin_with_the_id(magic, dtype, tmp_path):
    shard = open_shard(formats.llm_c(tmp_path / "a.bin", DOCS, magic, dtype), Reading(PATH, 1, bos=EOS))
    assert begins(shard, 0, shard.n_tokens) == starts(DOCS, 1)[:-1]


@pytest.mark.parametrize("kind", ["joined", "eos", "bos"])
def test_the_marks_of_documents_can_be_set(kind, tmp_path):
    file = formats.raw(tmp_path / "a.bin", DOCS)
    shard = open_shard(file, Reading(PATH, EOS, ord("a"), "uint16", kind))
    ids = flat(DOCS)
    expected = {
        "joined": [0],
        "eos": starts(DOCS, 1)[:-1],
        "bos": sorted({0, *(i for i, token in enumerate(ids) if token == ord("a"))}),
    }
    assert begins(shard, 0, shard.n_tokens) == expected[kind]


def truncate(file: Path, n: int = 3) -> Path:
    file.write_bytes(file.read_bytes()[:-n])
    return file


def big_endian(file: Path) -> Path:
    np.save(file, np.array(flat(DOCS), ">u4"))
    return file


def array(file: Path, value) -> Path:
    np.save(file, value, allow_pickle=True)
    return file


def metadata(file: Path, text: str) -> Path:
    formats.datatrove(file, DOCS)
    Path(f"{file}.metadata").write_text(text)
    return file


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


BAD: dict[str, Callable[[Path], Path]] = {
    "empty": lambda folder: written(folder / "a.bin", b""),
    "no dtype": lambda folder: formats.raw(folder / "a.bin", DOCS),
    "text": lambda folder: written(folder / "a.jsonl", b'{"text": "a"}\n'),
    "an index": lambda folder: written(folder / "a.idx", b"MMIDIDX\0\0"),
    "a pickle": lambda folder: written(folder / "meta.pkl", b"\x80\x04N."),
    "npy truncated": lambda folder: truncate(formats.npy(folder / "a.npy", DOCS)),
    "npy big-endian": lambda folder: big_endian(folder / "a.npy"),
    "npy of two dimensions": lambda folder: array(folder / "a.npy", np.zeros((3, 4), np.int32)),
    "npy of fractions": lambda folder: array(folder / "a.npy", np.zeros(9, np.float32)),
    "npy of objects": lambda folder: array(folder / "a.npy", np.array([{}, None], dtype=object)),
    "npy with half a header": lambda folder: written(folder / "a.npy", b"\x93NUMPY\x01"),
    "llm.c truncated": lambda folder: truncate(formats.llm_c(folder / "a.bin", DOCS)),
    "megatron truncated": lambda folder: truncate(formats.megatron(folder / "a.bin", DOCS), 4),
    "index truncated": lambda folder: truncate(
        formats.megatron(folder / "a.bin", DOCS).with_suffix(".idx")
    ).with_suffix(".bin"),
    "megatron of floats": lambda folder: formats.megatron(folder / "a.bin", DOCS, code=6),
    "another index": lambda folder: written(
        written(folder / "a.idx", b"TNTIDX\0\0" + bytes(60)).with_suffix(".bin"), bytes(80)
    ),
    "datatrove truncated": lambda folder: truncate(formats.datatrove(folder / "a.ds", DOCS), 2),
    "datatrove without metadata": lambda folder: Path(metadata(folder / "a.ds", "")),
    "datatrove of another width": lambda folder: metadata(folder / "a.ds", "name|8\n3\n"),
    "shard that no index describes": lambda folder: written(
        written(folder / "index.json", b"{}").with_name("a.bin"), b"ab"
    ),
    "no end of a document": lambda folder: array(folder / "a.npy", np.full(99, 7, np.int32)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(name, tmp_path):
    file = BAD[name](tmp_path)
    with pytest.raises(ConfigError) as refused:
        open_shard(file, READING)
    assert refused.value.path == PATH and refused.value.remedy
    assert Path(refused.value.value).stem.startswith(file.stem.split(".")[0]) or "idx" in refused.value.value
    if name == "npy big-endian":  # whatever the ids look like
        with pytest.raises(ConfigError):
            open_shard(file, Reading(PATH, EOS, documents="joined"))


def test_windows_go_around_a_ring_of_several_shards(tmp_path):
    parts = [documents(9, seed) for seed in range(3)]
    opened = [open_shard(formats.npy(tmp_path / f"{i}.npy", docs), READING) for i, docs in enumerate(parts)]
    ids = [i for docs in parts for i in flat(docs)]
    n, other = len(ids), Shards(opened[:1])
    rings = Rings({"other": other, "web": Shards(opened)}, 257, PATH)
    base = other.n_tokens
    for length in (5, n - 1):
        addresses = [base, base + n - 3, base + len(flat(parts[0])) - 2]
        cut = rings.cut(addresses, length)
        assert cut.real.all()
        for row, address in enumerate(addresses):
            at = [(address - base + i) % n for i in range(length)]
            assert cut.ids[row].tolist() == [ids[i] for i in at]
            expected = [i == 0 or ids[i - 1] == EOS for i in at]
            assert cut.begins[row, 1:].tolist() == expected[1:]


def test_a_part_of_tokens_is_a_ring_of_its_own_and_a_line_ends(tmp_path):
    part = Stretch(Shards([open_shard(formats.npy(tmp_path / "a.npy", DOCS), READING)]), 10, 90)
    cut = Rings({"web": part}, 257, PATH).cut([75], 20)
    assert cut.ids[0].tolist() == [*flat(DOCS)[85:90], *flat(DOCS)[10:25]]
    assert cut.begins[0, 5]
    tokens = Stretch(Shards([open_shard(formats.npy(tmp_path / "a.npy", DOCS), READING)]), 10, 30)
    cut = Line("web", tokens, 257, PATH).cut([15, -1], 8)
    assert cut.ids[0, :5].tolist() == flat(DOCS)[25:30]
    assert cut.real.tolist() == [[True] * 5 + [False] * 3, [False] * 8]


def test_an_id_beyond_the_vocabulary_is_refused_with_its_place(tmp_path):
    shards = Shards([open_shard(formats.npy(tmp_path / "a.npy", DOCS), READING)])
    at = next(i for i, token in enumerate(flat(DOCS)) if token == EOS)
    with pytest.raises(ConfigError) as refused:
        Rings({"web": shards}, 256, "data.sources.{name}").cut([0], 100)
    assert refused.value.path == "data.sources.web" and refused.value.value == EOS
    assert f"a.npy, token {at}" in refused.value.rule
