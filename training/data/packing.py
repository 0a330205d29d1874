"""Tokens on disk, and windows cut from them.

A split becomes one flat file of token ids, document after document, each followed by ``eos``, with an index of the
documents' starts. Training reads the file as a *ring* (the end continues at the beginning), so that no token is always
left out; evaluation reads it as a *line*, each token once, the last window padded.

Letters: B windows of a batch, T tokens of a window, N tokens of a split, V vocabulary.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.kernels.scoring import PADDING
from blockwright.registry.errors import FULL, ConfigError
from blockwright.registry.folder import write_text
from blockwright.training.claims import OWNER, alone, claimed, forget, is_abandoned, new_owner, remove_old_locks
from blockwright.training.data.corpus import SPLITS, Corpus, Split
from blockwright.training.data.tokenizers.tokenizer import Tokenizer, token_dtype

FORMAT = 1  # of the files below; part of the folder's name, so other formats are never read
INDEX, VOCABULARY = "index.json", "tokenizer.json"
INLINE_STARTS = 2**16  # maximum number of document starts kept in the index itself, else in a separate file

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens of one split, mapped from disk.

    Args:
        path: file of token ids
        dtype: of the ids in the file
        starts: first token of each document, ascending [documents]
        n_tokens: N, including one ``eos`` per document
        eos: the id that ends a document, also used as padding
    """

    path: Path
    dtype: str
    starts: Ints
    n_tokens: int
    eos: int

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """The ids [N], read-only, memory-mapped."""
        if self.n_tokens == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would send all tokens to a spawned loader process; it maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


def ring(offsets: Ints, length: int, n_tokens: int) -> Ints:
    """Indices of windows in the stream, wrapping around its end.

    Args:
        offsets: first token of each window [B]
        length: tokens of a window
        n_tokens: N

    Returns:
        indices [B, length] in [0, N)
    """
    return (offsets[:, None] + np.arange(length)) % n_tokens


def line(offsets: Ints, length: int, n_tokens: int) -> Ints:
    """Indices of windows in the stream, without wrapping; −1 after the end, and throughout for an offset of −1.

    Args and shapes: as for ``ring``.
    """
    places = offsets[:, None] + np.arange(length)
    return np.where((places < n_tokens) & (offsets[:, None] >= 0), places, -1)


def cut(stream: Stream, places: Ints, token_bytes: Ints, joined: bool = False) -> dict[str, Ints]:
    """Cut windows of a stream into a batch.

    Memory and time are linear in B·T, whatever N is: only the tokens of the windows are read from the map.

    Args:
        stream: the tokens
        places: indices of the T inputs and one more token [B, T + 1]; −1 is padding
        token_bytes: UTF-8 bytes of each id [V]
        joined: whether a window is one document, in which the ends of documents are tokens like others

    Returns:
        tokens [B, T]; targets [B, T], the next token, or −100 where it begins another document or is padding;
        segments [B, T], the document's number within its window, from 0, and −1 of padding;
        positions [B, T], from 0 at each document's start and at the window's; n_bytes [B], of the scored targets
    """
    real = places >= 0
    ids = np.where(real, stream.tokens[places], stream.eos).astype(np.int64)
    begins = np.zeros_like(real) if joined else _begins(stream.starts, places)
    return shaped(ids, begins, real, token_bytes)


def shaped(ids: Ints, begins: Flags, real: Flags, token_bytes: Ints) -> dict[str, Ints]:
    """Windows as a batch.

    Args:
        ids: of the T inputs and one more token [B, T + 1]
        begins: whether a document begins there; changed, for a window begins one too
        real: whether there is a token, not padding
        token_bytes: UTF-8 bytes of each id [V]

    Returns:
        as of ``cut``
    """
    begins[:, 1:] |= real[:, :-1] & ~real[:, 1:]
    begins[:, 0] = True
    tokens, inputs_begin = ids[:, :-1], begins[:, :-1]
    counted = real[:, 1:] & ~begins[:, 1:]
    column = np.arange(tokens.shape[1])
    return {
        "tokens": tokens,
        "targets": np.where(counted, ids[:, 1:], IGNORED),
        "segments": np.where(real[:, :-1], np.cumsum(inputs_begin, axis=1) - 1, PADDING),
        "positions": column - np.maximum.accumulate(np.where(inputs_begin, column, 0), axis=1),
        "n_bytes": np.where(counted, token_bytes[ids[:, 1:]], 0).sum(axis=1),
    }


def _begins(starts: Ints, places: Ints) -> Flags:
    """Whether a document begins at each index."""
    nearest = np.searchsorted(starts, places).clip(max=len(starts) - 1)
    return starts[nearest] == places


@dataclass(frozen=True, eq=False)
class Packed:
    """A tokenised corpus on disk.

    Args:
        streams: by split; a split without text has 0 tokens
        vocabulary: the fitted tokenizer's ``to_json``
    """

    streams: dict[Split, Stream]
    vocabulary: dict[str, Any]


def cache_key(corpus_fingerprint: str, tokenizer: Tokenizer) -> str:
    """Name of the cache folder: a digest of the text, its splits, the tokenizer's current state, and the format."""
    parts = [str(FORMAT), corpus_fingerprint, tokenizer.fingerprint()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def pack(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path, key: str) -> Packed:
    """The tokens of a corpus, from the cache or built now.

    Several processes may call this at once, on one file system, and any may be killed: one builds, the others wait
    (training/claims.py lists the file systems). Each builder writes to a folder of its own, renamed when complete, so
    that two that do not see each other do no harm. A folder with missing or truncated files is rebuilt.

    Args:
        corpus: the text
        tokenizer: fitted here on the train split if needed
        cache_dir: folder of all caches
        key: of this cache, from ``cache_key`` *before* the tokenizer was fitted

    Raises:
        ConfigError: at ``data.cache_dir`` if it cannot be written; errors of the corpus and of ``Tokenizer.fit``
    """
    folder = cache_dir / key
    found = load(folder, tokenizer.eos)
    if found:
        return found
    with contextlib.ExitStack() as held:
        owner = new_owner()
        mine = _aside(folder, owner)
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _sweep(cache_dir)
            held.enter_context(alone(cache_dir / f".{key}.lock", "preparing the same text"))
            found = load(folder, tokenizer.eos)
            if found:
                return found
            held.enter_context(claimed(cache_dir, owner))
            mine.mkdir()
        except OSError as error:
            raise _unwritable(cache_dir, error) from error
        try:
            _write(corpus, tokenizer, mine)
            _publish(mine, folder, tokenizer.eos)
        except OSError as error:
            if error.errno not in FULL:  # reading the text fails otherwise
                raise
            raise _unwritable(cache_dir, error) from error
        finally:
            shutil.rmtree(mine, ignore_errors=True)
    packed = load(folder, tokenizer.eos)
    assert packed, f"{folder} was written but cannot be read"
    return packed


def _unwritable(cache_dir: Path, error: OSError) -> ConfigError:
    rule = f"the token cache cannot be written here ({error.strerror})"
    remedy = "Name a folder of yours on a disk with room: data.cache_dir=…"
    return ConfigError("data.cache_dir", str(cache_dir), rule, remedy)


def load(folder: Path, eos: int) -> Packed | None:
    """A cache from disk, or None if it is missing, broken or truncated.

    Args:
        folder: written by ``pack``
        eos: of the tokenizer
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        vocabulary = json.loads((folder / VOCABULARY).read_text())
        streams: dict[Split, Stream] = {}
        for split in SPLITS:
            n_tokens, entry = index[split]["n_tokens"], index[split]["starts"]
            if isinstance(entry, list):  # document starts, in the index or in a file of their own
                starts = np.array(entry, dtype=np.int64)
            else:
                starts = np.memmap(folder / f"{split}.starts", dtype=np.int64, mode="r", shape=(entry["n"],))
            streams[split] = Stream(folder / f"{split}.bin", index["dtype"], starts, n_tokens, eos)
            if streams[split].path.stat().st_size != n_tokens * np.dtype(index["dtype"]).itemsize:
                return None
        return Packed(streams, vocabulary)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    if not tokenizer.fitted:
        tokenizer.fit(part for document in corpus.streams("train") for part in tokenizer.parts(document))
    dtype = token_dtype(tokenizer.vocab_size)
    index: dict[str, Any] = {"dtype": np.dtype(dtype).name}
    for split in SPLITS:
        index[split] = _write_split(corpus.streams(split), tokenizer, folder / f"{split}.bin", dtype)
    write_text(folder / VOCABULARY, json.dumps(tokenizer.to_json()))
    write_text(folder / INDEX, json.dumps(index))


def _write_split(
    documents: Iterable[Iterable[str]], tokenizer: Tokenizer, path: Path, dtype: type[np.unsignedinteger]
) -> dict[str, Any]:
    """Write the ids of a split to a file, a part of a document at a time; returns its entry in the index."""
    starts, n_tokens = array("q"), 0
    eos = np.array(tokenizer.eos, dtype=dtype).tobytes()
    with path.open("wb") as file:
        for document in documents:
            start = n_tokens
            for part in tokenizer.parts(document):
                ids = tokenizer.encode(part).astype(dtype, copy=False)
                file.write(ids.tobytes())
                n_tokens += len(ids)
            if n_tokens > start:
                starts.append(start)
                file.write(eos)
                n_tokens += 1
        _to_disk(file)
    if len(starts) <= INLINE_STARTS:
        return {"n_tokens": n_tokens, "starts": starts.tolist()}
    beside = path.with_suffix(".starts")
    with beside.open("wb") as file:
        starts.tofile(file)
        _to_disk(file)
    return {"n_tokens": n_tokens, "starts": {"n": len(starts)}}


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())  # else a power failure after the rename leaves files of zeros


def _aside(folder: Path, owner: str) -> Path:
    """A unique name beside a cache folder, which ``_sweep`` finds if its owner is killed."""
    return folder.parent / f".{folder.name}.{owner}"


def _publish(mine: Path, folder: Path, eos: int) -> None:
    """Rename a finished folder, unless another process was faster; replaces a broken one."""
    while True:
        try:
            mine.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if load(folder, eos):
            return
        broken = _aside(folder, new_owner())
        with contextlib.suppress(FileNotFoundError):  # another process may have done the same
            folder.rename(broken)
            shutil.rmtree(broken, ignore_errors=True)


def _sweep(cache_dir: Path) -> None:
    """Remove the remains of killed writers."""
    for path in cache_dir.glob(".*.*"):
        written_by = re.search(rf"\.({OWNER})\Z", path.name)
        owner = written_by[1] if written_by else None
        if path.is_dir() and is_abandoned(path, owner):
            shutil.rmtree(path, ignore_errors=True)
            forget(cache_dir, owner)
    remove_old_locks(cache_dir)
