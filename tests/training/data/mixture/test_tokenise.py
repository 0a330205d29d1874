"""Text to shards: the same for any number of processes and after any stop, as data=mixture and Megatron read them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockwright.registry.errors import ConfigError
from blockwright.training.claims import new_owner
from blockwright.training.data.mixture import readers
from blockwright.training.data.mixture.shards import Reading, open_shard
from blockwright.training.data.mixture.tokenise import main
from blockwright.training.data.mixture.writing import Job, write_shard
from blockwright.training.data.tokenizers.tokenizer import Bytes
from tests import built

TEXTS = [f"document {i}, of{' words' * (i % 5)}\nand ä line" for i in range(40)]
EOS = 256


def lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def zstd(content: bytes) -> bytes:
    """Two frames, as tools that write in parallel make."""
    pyarrow = pytest.importorskip("pyarrow")
    half = len(content) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))


def parquet(file: Path, texts: list[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file, row_group_size=7)


def arrow(file: Path, texts: list[str], kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": texts, "id": range(len(texts))})
    with getattr(pyarrow.ipc, kind)(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


WRITTEN: dict[str, Callable[[Path], None]] = {
    "a.jsonl": lambda file: file.write_bytes(lines(TEXTS)),
    "a.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines(TEXTS))),
    "a.json.gz": lambda file: file.write_bytes(gzip.compress(lines(TEXTS))),
    "a.jsonl.zst": lambda file: file.write_bytes(zstd(lines(TEXTS))),
    "a.parquet": lambda file: parquet(file, TEXTS),
    "a.arrow": lambda file: arrow(file, TEXTS, "new_stream"),
    "b.arrow": lambda file: arrow(file, TEXTS, "new_file"),
}


def test_every_format_gives_the_same_documents_and_blank_ones_are_left_out(tmp_path):
    for name, write in WRITTEN.items():
        write(tmp_path / name)
        readers.check(tmp_path / name)
        assert [*readers.documents(tmp_path / name, "text")] == TEXTS, name
    (tmp_path / "a.txt").write_text(TEXTS[3])
    (tmp_path / "b.jsonl").write_bytes(lines(["", TEXTS[0], " \n"]))
    assert [*readers.documents(tmp_path / "a.txt", "text")] == [TEXTS[3]]
    assert [*readers.documents(tmp_path / "b.jsonl", "text")] == [TEXTS[0]]


BAD: dict[str, bytes] = {
    "broken.jsonl": lines(TEXTS[:3]) + b'{"text": "half', "a_list.jsonl": b"[1, 2]\n",
    "column.jsonl": lines(TEXTS[:2], "content"), "number.jsonl": b'{"text": 5}\n',
    "nested.jsonl": b'{"text": "x", "n": ' + b"[" * 100_000 + b"\n",
    "half.jsonl.gz": gzip.compress(lines(TEXTS))[:-20], "no.jsonl.gz": lines(TEXTS),
    "latin.txt": "grün".encode("latin-1"), "no.parquet": b"PAR1 not", "no.arrow": b"ARROW1\0\0 not",
    "page.html": b"<p>",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(ConfigError) as refused:
        [*readers.documents(tmp_path / name, "text")]
    assert refused.value.path == "FILES" and refused.value.value.endswith(name) and refused.value.remedy


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of four files, one of them without documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_bytes(lines(TEXTS[i * 12 : (i + 1) * 12]))
    (folder / "empty.jsonl").write_bytes(b"\n")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.slow
def test_shards_are_the_documents_whatever_the_number_of_processes(texts, tmp_path):
    for n in (1, 3):
        assert main([f"{texts}/*.jsonl", str(tmp_path / f"out{n}"), "--tokenizer=bytes", f"--processes={n}"]) == 0
    out = tmp_path / "out1"
    assert contents(out) == contents(tmp_path / "out3")
    index = json.loads((out / "index.json").read_text())
    assert [*index["shards"]] == ["00000.bin", "00001.bin", "00002.bin"]
    for i, (name, entry) in enumerate(index["shards"].items()):
        ids = np.fromfile(out / name, index["dtype"]).tolist()
        here = TEXTS[i * 12 : (i + 1) * 12]
        assert ids == [token for text in here for token in (*text.encode(), EOS)]
        assert entry["sha256"] == contents(out)[name] and entry["tokens"] == len(ids)
        assert entry["documents"] == 12 and entry["bytes"] == sum(len(text.encode()) for text in here)
        assert open_shard(out / name, Reading("data.sources.web.files", EOS)).n_tokens == len(ids)


@pytest.mark.slow
def test_a_stopped_job_continues_with_the_files_that_are_missing(texts, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([f"{texts}/*.jsonl", str(whole), "--tokenizer=bytes", "--processes=1"]) == 0
    job = Job(sorted(texts.iterdir()), stopped, Bytes())
    job.begin()
    write_shard(job, 1)
    killed = new_owner()
    for name in (f".00000.{killed}.partial", f".{killed}.lock"):
        (stopped / name).write_bytes(b"half of a shard")
    before = (stopped / "00001.bin").stat().st_mtime_ns
    capsys.readouterr()
    assert main([f"{texts}/*.jsonl", str(stopped), "--tokenizer=bytes", "--processes=1"]) == 0
    assert "1 of 4 files" in capsys.readouterr().err
    assert contents(stopped) == contents(whole) and (stopped / "00001.bin").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_killed_job_leaves_no_process_and_continues(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.jsonl").write_bytes(lines(TEXTS * 200))
    command = [sys.executable, "-m", "blockwright.training.data.mixture.tokenise", f"{folder}/*.jsonl"]
    command += [str(tmp_path / "out"), "--tokenizer=bytes", "--processes=2"]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not [*(tmp_path / "out").glob("000*.json")] and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert (tmp_path / "out" / "job.json").exists()
    while time.monotonic() < deadline:  # the processes end with the first one
        try:
            os.killpg(started.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process is left")
    assert subprocess.run(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len({entry["sha256"] for entry in index["shards"].values()}) == 1 and len(index["shards"]) == 20


def test_one_command_at_a_time_writes_a_folder(texts, tmp_path):
    jobs = [Job(sorted(texts.iterdir()), tmp_path / "out", Bytes()) for _ in range(2)]
    with jobs[0].alone():
        with pytest.raises(ConfigError) as refused, jobs[1].alone():
            pass
        assert refused.value.path == "OUT"
        write_shard(jobs[0], 0)
    with jobs[1].alone():
        assert jobs[1].finished()


def test_two_that_do_not_see_each_other_write_the_same(texts, tmp_path, monkeypatch):
    first, second = (Job(sorted(texts.iterdir()), tmp_path / "out", Bytes()) for _ in range(2))
    first.begin()
    read = readers.documents

    def documents(path, column):
        monkeypatch.setattr(readers, "documents", lambda path, column: iter(["half of it"]))
        write_shard(second, 1)
        (tmp_path / "out" / "00001.json").unlink()  # before its record
        yield from read(path, column)

    monkeypatch.setattr(readers, "documents", documents)
    written = write_shard(first, 1)
    assert hashlib.sha256((tmp_path / "out" / "00001.bin").read_bytes()).hexdigest() == written.sha256


def test_a_text_that_has_changed_since_is_refused_and_one_that_was_copied_is_not(texts, tmp_path):
    job = Job(sorted(texts.glob("?.jsonl")), tmp_path / "out", Bytes())
    job.begin()
    write_shard(job, 0)
    file, old = job.files[0], job.files[0].read_bytes()
    file.write_bytes(old.replace(b"document 1", b"DOCUMENT 1"))
    with pytest.raises(ConfigError) as refused:
        job.begin()
    assert refused.value.path == "FILES" and refused.value.value == str(file)
    file.write_bytes(old)
    job.files[1].write_bytes(b"not yet a shard")
    job.begin()
    assert [*job.finished()] == [0]


def test_a_shard_that_is_cut_or_gone_is_written_again(texts, tmp_path):
    job = Job(sorted(texts.glob("?.jsonl")), tmp_path / "out", Bytes())
    job.begin()
    whole = [write_shard(job, number) for number in range(3)]
    os.truncate(job.folder / "00001.bin", 10)
    (job.folder / "00002.bin").unlink()
    assert [*job.finished()] == [0]
    assert [write_shard(job, number) for number in (1, 2)] == whole[1:]


def test_half_of_a_surrogate_pair_is_written_as_a_replacement_and_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ude00"}\n{"text": "\\ud83d\\ude00"}\n')
    job = Job([file], tmp_path / "out", Bytes())
    job.begin()
    written = write_shard(job, 0)
    ids = np.fromfile(job.folder / "00000.bin", np.uint16).tolist()
    texts = ["a \ufffd b", "\ufffd", "\U0001f600"]
    assert ids == [token for text in texts for token in (*text.encode(), EOS)]
    assert (written.repaired, written.bytes) == (2, sum(len(text.encode()) for text in texts))


@pytest.mark.slow
def test_megatrons_format_is_read_as_megatrons(texts, tmp_path):
    out = tmp_path / "out"
    assert main([f"{texts}/*.jsonl", str(out), "--tokenizer=bytes", "--format=megatron", "--processes=1"]) == 0
    (out / "index.json").unlink()  # so that only the .idx describes them
    shard = open_shard(out / "00001.bin", Reading("data.sources.web.files", EOS, documents="index"))
    ids = shard.ids(0, shard.n_tokens)
    assert ids.tolist() == [token for text in TEXTS[12:24] for token in (*text.encode(), EOS)]
    begins = np.flatnonzero(shard.borders.begins(ids, 0)).tolist()
    assert begins == np.cumsum([0, *(len(text.encode()) + 1 for text in TEXTS[12:23])]).tolist()


@pytest.mark.parametrize("change", ["--processes=0", "--procs=2"])
def test_a_wrong_argument_is_refused(texts, tmp_path, change):
    assert main([f"{texts}/*.jsonl", str(tmp_path / "out"), "--tokenizer=bytes", "--processes=1", change]) == 64
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.slow
def test_another_job_is_not_mixed_in(texts, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main([f"{texts}/*.jsonl", out, "--tokenizer=bytes", "--processes=1"]) == 0
    (texts / "9.jsonl").write_bytes(lines(TEXTS[:2]))
    assert main([f"{texts}/*.jsonl", out, "--tokenizer=bytes", "--processes=1"]) == 64
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main([f"{texts}/*.jsonl", str(tmp_path / "mine"), "--tokenizer=bytes", "--processes=1"]) == 64
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.slow
def test_the_fingerprint_shows_another_tokenizer(texts, tmp_path):
    out = tmp_path / "out"
    assert main([f"{texts}/*.jsonl", str(out), "--tokenizer=bytes", "--processes=1"]) == 0
    settings = {"sources": {"web": {"files": f"{out}/*.bin"}}, "sequence_length": 16, "cache_dir": str(tmp_path)}
    built.data("mixture", tokenizer=Bytes(300), **settings).check()  # more room in the vocabulary is the same tokenizer
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "tokenizer": "0" * 64}))
    with pytest.raises(ConfigError) as refused:
        built.data("mixture", tokenizer=Bytes(), **settings).check()
    assert refused.value.path == "data.sources.web.files"
