"""Tokenise files of text into shards, a shard for each file, by several processes.

The shards depend on the files and the tokenizer alone, not on the number of processes. A file is written under another
name and renamed when it is complete; so a job that was killed continues with the files that it had not finished.

Batches of documents gain nothing a core over documents one by one (measured: 1.24 to 1.59 MB/s against 1.46 to 1.64).
So each process encodes a file of its own, without threads of the library.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockwright.registry.errors import ConfigError
from blockwright.registry.folder import read_json
from blockwright.registry.reading import read
from blockwright.training.data.fingerprint import digest
from blockwright.training.data.mixture import readers
from blockwright.training.data.mixture.agreement import ids_digest
from blockwright.training.data.mixture.shards import MEGATRON, MEGATRON_DTYPES, MEGATRON_HEAD
from blockwright.training.data.packing import INDEX
from blockwright.training.data.tokenizers.base import Tokenizer, token_dtype
from blockwright.training.data.tokenizers.rebuild import rebuild
from blockwright.training.writing import write_json

JOB = "job.json"  # in the folder of shards: what they are made of
PARTIAL = ".partial"


@dataclass(frozen=True)
class Written:
    """A complete shard.

    Args:
        input: name of the file of text
        tokens: of the shard, the ends of documents included
        documents: of the file, without blank ones
        bytes: of its text in UTF-8
        sha256: of the shard's file; empty for a shard without documents, which has no file
    """

    input: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


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
        path.with_suffix(".idx").write_bytes(head + b"".join(part.tobytes() for part in parts))


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
        """What the shards depend on, as plain types."""
        files = [[file.name, file.stat().st_size] for file in self.files]
        made = {"tokenizer": ids_digest(self.tokenizer), "column": self.column, "format": self.format}
        return {**made, "eos": self.tokenizer.eos, "files": digest(files), "shards": len(files)}

    def begin(self) -> None:
        """Create the folder, or continue in it.

        Raises:
            ConfigError: the folder has other files, or shards of other text or another tokenizer
        """
        for file in self.files:
            readers.check(file)
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / JOB
        if not known.exists():
            if any(self.folder.iterdir()):
                raise ConfigError(
                    "OUT", str(self.folder), "has other files in it", "Name a new folder, or an empty one"
                )
            write_json(known, self.identity())
        written, identity = read_json(self.folder, known.name), self.identity()
        if changed := [key for key in identity if written.get(key) != identity[key]]:
            rule = f"was begun with other {', '.join(changed)}"
            raise ConfigError("OUT", str(self.folder), rule, "Repeat the first command, or name a new folder")

    def finished(self) -> dict[int, Written]:
        """The shards that are complete."""
        records = {number: f"{self.name(number)}.json" for number in range(len(self.files))}
        return {
            number: read(Written, read_json(self.folder, name), str(self.folder / name))
            for number, name in records.items()
            if (self.folder / name).exists()
        }

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


def write_shard(job: Job, number: int) -> Written:
    """Write the shard of a file of text.

    Args:
        job: that it belongs to
        number: of the file

    Raises:
        ConfigError: for a file that cannot be read
    """
    path, made = job.folder / f"{job.name(number)}.bin", FORMATS[job.format](job.tokenizer.vocab_size)
    partial, shard, end = Path(f"{path}{PARTIAL}"), _Shard(), np.array([job.tokenizer.eos], made.dtype)
    with partial.open("wb") as file:
        for text in readers.documents(job.files[number], job.column):
            parts = [job.tokenizer.encode(part).astype(made.dtype, copy=False) for part in job.tokenizer.parts([text])]
            ids = np.concatenate([*parts, end])
            shard.hasher.update(ids.tobytes())
            file.write(ids.tobytes())
            shard.lengths.append(len(ids))
            shard.bytes += len(text.encode())
        file.flush()
        os.fsync(file.fileno())  # else a power failure after the rename leaves a file of zeros
    if not shard.lengths:
        partial.unlink()
    else:
        made.close(path, shard.lengths)
        partial.rename(path)
    sha256 = shard.hasher.hexdigest() if shard.lengths else ""
    written = Written(job.files[number].name, sum(shard.lengths), len(shard.lengths), shard.bytes, sha256)
    write_json(job.folder / f"{job.name(number)}.json", asdict(written))
    return written


_job: Job | None = None  # of a process of the pool


def _begin(state: dict[str, Any], files: Sequence[Path], folder: Path, column: str, form: str) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job = Job(files, folder, rebuild(state), column, form)


def _write(number: int) -> tuple[int, Written]:
    assert _job is not None
    return number, write_shard(_job, number)
