"""Tokenise files of text into shards, a shard for each file, by several processes.

The shards depend on the files and the tokenizer alone, not on the number of processes. A file is written under a name
of its own, read back and renamed when it is complete; so a job that was killed continues with the files that it had not
finished. One command at a time writes a folder. Where a file system has no locks, two may: they then write the same.

Batches of documents gain nothing a core over documents one by one (measured: 1.24 to 1.59 MB/s against 1.46 to 1.64).
So each process encodes a file of its own, without threads of the library.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockwright.registry.errors import ConfigError
from blockwright.registry.folder import read_json, write_bytes, write_json
from blockwright.registry.reading import read
from blockwright.training.claims import (
    LOCK,
    OWNER,
    claimed,
    forget,
    is_abandoned,
    new_owner,
    only_writer,
    remove_old_locks,
)
from blockwright.training.data.fingerprint import digest, of_file
from blockwright.training.data.mixture import readers
from blockwright.training.data.mixture.shards import MEGATRON, MEGATRON_DTYPES, MEGATRON_HEAD
from blockwright.training.data.mixture.tokens import ids_digest
from blockwright.training.data.packing import INDEX
from blockwright.training.data.tokenizers.rebuild import rebuild
from blockwright.training.data.tokenizers.tokenizer import Tokenizer, token_dtype

JOB = "job.json"  # in the folder of shards: what they are made of
PARTIAL = ".partial"  # a shard that is being written: .NUMBER.OWNER.partial


@dataclass(frozen=True)
class Written:
    """A complete shard.

    Args:
        input: name of the file of text
        tokens: of the shard, the ends of documents included
        documents: of the file, without blank ones
        bytes: of its text in UTF-8
        sha256: of the shard's file; empty for a shard without documents, which has no file
        source: SHA-256 of the file of text; empty in records of earlier versions
        repaired: documents with half of a surrogate pair, written as U+FFFD
    """

    input: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    source: str = ""
    repaired: int = 0


class Format(ABC):
    """The files of a shard."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @property
    @abstractmethod
    def dtype(self) -> type[np.integer]:
        """Of the ids."""

    @abstractmethod
    def close(self, path: Path, lengths: Sequence[int]) -> None:
        """Write what stands beside the ids.

        Args:
            path: of the ids
            lengths: tokens of each document
        """


class Flat(Format):
    """Ids alone, described by ``index.json``: documents end in ``eos``, which is their index."""

    @property
    def dtype(self) -> type[np.integer]:
        return token_dtype(self.vocab_size)

    def close(self, path: Path, lengths: Sequence[int]) -> None:
        pass


class Megatron(Format):
    """Megatron's ``.bin`` and ``.idx``, documents ended as by ``--append-eod``. Its ids are uint16 below 65,500."""

    @property
    def dtype(self) -> type[np.integer]:
        return np.uint16 if self.vocab_size < 65500 else np.int32

    def close(self, path: Path, lengths: Sequence[int]) -> None:
        code = next(code for code, name in MEGATRON_DTYPES.items() if name == np.dtype(self.dtype).name)
        tokens, n = np.array(lengths, np.int32), len(lengths)
        pointers = (np.cumsum(tokens, dtype=np.int64) - tokens) * np.dtype(self.dtype).itemsize
        parts = (tokens, pointers, np.arange(n + 1, dtype=np.int64))
        head = MEGATRON_HEAD.pack(MEGATRON, 1, code, n, n + 1)
        write_bytes(path.with_suffix(".idx"), head + b"".join(part.tobytes() for part in parts))


FORMATS: Mapping[str, type[Format]] = {"flat": Flat, "megatron": Megatron}


@dataclass(frozen=True)
class Job:
    """Files of text and how they become shards.

    Args:
        files: of text, sorted
        folder: of the shards
        tokenizer: text to ids
        column: of a record that has the text
        format: of the shards: ``flat`` or ``megatron``
    """

    files: Sequence[Path]
    folder: Path
    tokenizer: Tokenizer
    column: str = "text"
    format: str = "flat"

    def name(self, number: int) -> str:
        """The name of a shard, without a suffix."""
        return f"{number:05}"

    def identity(self) -> dict[str, Any]:
        """What the shards depend on, as plain types; what is in a file, the record of its shard has."""
        files = [file.name for file in self.files]
        made = {"tokenizer": ids_digest(self.tokenizer), "column": self.column, "format": self.format}
        return {**made, "eos": self.tokenizer.eos, "files": digest(files), "shards": len(files)}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context of the one process that writes the folder, with those that it starts; the folder is begun in it.

        Raises:
            ConfigError: another process writes it; errors of ``begin``
        """
        for file in self.files:
            readers.check(file)
        self.folder.mkdir(parents=True, exist_ok=True)
        with only_writer(self.folder) as alone:
            if not alone:
                rule = "is being written by another process"
                raise ConfigError("OUT", str(self.folder), rule, "Wait for it, or name another folder")
            self.begin()
            yield

    def begin(self) -> None:
        """Create the folder, or continue in it.

        Raises:
            ConfigError: the folder has other files, or shards of other text or another tokenizer
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / JOB
        if not known.exists():
            if any(path.name != LOCK and not path.name.endswith(PARTIAL) for path in self.folder.iterdir()):
                raise ConfigError(
                    "OUT", str(self.folder), "has other files in it", "Name a new folder, or an empty one"
                )
            write_json(known, self.identity())
        written, identity = read_json(self.folder, known.name), self.identity()
        if changed := [key for key in identity if written.get(key) != identity[key]]:
            rule = f"was begun with other {', '.join(changed)}"
            raise ConfigError("OUT", str(self.folder), rule, "Repeat the first command, or name a new folder")
        for number, each in self.finished().items():
            file, record = self.files[number], self.folder / f"{self.name(number)}.json"
            touched = file.stat().st_ctime_ns > record.stat().st_mtime_ns  # copied, or changed to one of the same size
            if touched and each.source and of_file(file) != each.source:
                rule = f"has changed since {record.with_suffix('.bin')} was made of it"
                raise ConfigError("FILES", str(file), rule, "Put the old file back, or name a new folder")
        for path in self.folder.glob(f".*{PARTIAL}"):  # of commands that were killed
            owner = path.name.removesuffix(PARTIAL).rpartition(".")[2]
            if not re.fullmatch(OWNER, owner) or is_abandoned(path, owner):  # or of a record, which one process writes
                path.unlink(missing_ok=True)
                forget(self.folder, owner)
        remove_old_locks(self.folder)

    def finished(self) -> dict[int, Written]:
        """The shards that are complete: with a record, and a file of the size that it says."""
        found = {}
        size = np.dtype(FORMATS[self.format](self.tokenizer.vocab_size).dtype).itemsize
        for number in range(len(self.files)):
            record = self.folder / f"{self.name(number)}.json"
            if record.exists():
                written = read(Written, read_json(self.folder, record.name), str(record))
                shard = record.with_suffix(".bin")
                if not written.tokens or (shard.is_file() and shard.stat().st_size == written.tokens * size):
                    found[number] = written
        return found

    def run(self, processes: int) -> Iterator[tuple[int, Written]]:
        """Write the shards that are missing, in any order.

        Args:
            processes: how many, at least 1

        Raises:
            ConfigError: for a file that cannot be read; the shards of others stay
        """
        done = self.finished()
        missing = sorted(set(range(len(self.files))) - done.keys(), key=lambda n: -self.files[n].stat().st_size)
        state = (self.tokenizer.to_json(), self.files, self.folder, self.column, self.format)
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(processes, max(len(missing), 1)), _begin, state) as pool:  # ends them if left early
            yield from pool.imap_unordered(_write, missing)

    def conclude(self) -> dict[str, Any]:
        """Write the index of the shards, which are all complete.

        Returns:
            its entries: name of the file of a shard → what it holds
        """
        done = self.finished()
        dtype = np.dtype(FORMATS[self.format](self.tokenizer.vocab_size).dtype).name
        shards = {f"{self.name(number)}.bin": asdict(each) for number, each in done.items() if each.tokens}
        index = {"format": 1, "dtype": dtype, "eos": self.tokenizer.eos, "tokenizer": ids_digest(self.tokenizer)}
        write_json(self.folder / INDEX, {**index, "shards": shards})
        return shards


@dataclass
class _Shard:
    """A shard while it is written."""

    hasher: Any = field(default_factory=hashlib.sha256)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    bytes: int = 0
    repaired: int = 0


def write_shard(job: Job, number: int) -> Written:
    """Write the shard of a file of text.

    Args:
        job: that it belongs to
        number: of the file

    Raises:
        ConfigError: for a file that cannot be read, or changes meanwhile; the shard differs from what was written
    """
    source, path = job.files[number], job.folder / f"{job.name(number)}.bin"
    made, owner = FORMATS[job.format](job.tokenizer.vocab_size), new_owner()
    partial, shard, end = path.with_name(f".{job.name(number)}.{owner}{PARTIAL}"), _Shard(), job.tokenizer.eos
    before = source.stat()
    with claimed(job.folder, owner):
        try:
            with partial.open("wb") as file:
                for text, utf8 in _valid(readers.documents(source, job.column), shard):
                    parts = [job.tokenizer.encode(part) for part in job.tokenizer.parts([text])]
                    ids = np.concatenate([*parts, [end]]).astype(made.dtype)
                    shard.hasher.update(ids.tobytes())
                    file.write(ids.tobytes())
                    shard.lengths.append(len(ids))
                    shard.bytes += len(utf8)
                file.flush()
                os.fsync(file.fileno())  # else a power failure after the rename leaves a file of zeros
            sha256, origin, after = shard.hasher.hexdigest(), of_file(source), source.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise ConfigError(
                    "FILES", str(source), "changes while it is read", "Repeat the command when it is whole"
                )
            if of_file(partial) != sha256:
                raise ConfigError("OUT", str(path), "differs from what was written", "Check the disk, or name another")
            if shard.lengths:
                made.close(path, shard.lengths)
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    found = (sum(shard.lengths), len(shard.lengths), shard.bytes, sha256 if shard.lengths else "")
    written = Written(source.name, *found, origin, shard.repaired)
    write_json(job.folder / f"{job.name(number)}.json", asdict(written))
    return written


def _valid(texts: Iterator[str], shard: _Shard) -> Iterator[tuple[str, bytes]]:
    """Texts and their UTF-8.

    JSON may hold half of a surrogate pair, as in dumps of the web where a text was cut amid an emoji. It is no
    character, so it becomes U+FFFD, as in every decoder: a file of 100 GB is not refused for one of them.
    """
    for text in texts:
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            utf8 = text.encode()
            shard.repaired += 1
        yield text, utf8


_job: Job | None = None  # of a process of the pool


def _begin(state: dict[str, Any], files: Sequence[Path], folder: Path, column: str, form: str) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job = Job(files, folder, rebuild(state), column, form)


def _write(number: int) -> tuple[int, Written]:
    assert _job is not None
    return number, write_shard(_job, number)
