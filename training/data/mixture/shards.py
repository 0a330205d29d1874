"""Files of token ids that other tools wrote, mapped where they are. Nothing of them is unpickled or executed.

=========================  ===========================================  =====================================
file                       how it is recognised                         documents
=========================  ===========================================  =====================================
``blockwright tokenise``   ``index.json`` beside it                     end in ``eos``
Megatron ``.bin``          ``.idx`` beside it, with its magic           end in ``eos``, else as its index says
datatrove ``.ds``          ``.ds.metadata`` gives the width of an id    end in ``eos``, else as ``.ds.index`` says
NumPy ``.npy``             its magic                                    end in ``eos``
OLMo, Dolma ``.npy``       no magic: ids alone, ``dtype`` is needed     end in ``eos``
llm.c ``.bin``             magic 20240520 (uint16), 20240801 (uint32)   begin with ``bos``
nanoGPT ``.bin``, others   ids alone, ``dtype`` is needed               end in ``eos``
=========================  ===========================================  =====================================
"""

from __future__ import annotations

import functools
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import ConfigError
from blockwright.registry.folder import parse_json
from blockwright.registry.limits import read_plain
from blockwright.training.data.mixture.order import Ints
from blockwright.training.data.packing import INDEX

# --- files of numbers, mapped when they are first read, and a limited number at once ---


MOST = 256  # mapped at once, in each process: systems limit open files


@functools.lru_cache(maxsize=MOST)
def mapped(path: Path, dtype: str, offset: int, n: int) -> npt.NDArray[Any]:
    """The n numbers of a file after ``offset`` bytes, read-only."""
    return np.memmap(path, dtype, "r", offset, (n,)).view(np.ndarray)  # slicing a memmap itself costs 10 µs


# --- where documents begin in a shard of tokens ---


Flags = npt.NDArray[np.bool_]


class Borders(ABC):
    """Where documents begin."""

    def begins(self, ids: Ints, at: int) -> Flags:
        """Whether each of consecutive tokens begins a document; of the first it is known only if an id says so.

        Args:
            ids: of the tokens [n]
            at: place of the first one in the shard
        """
        found = self.within(ids, at)
        found[:1] |= at == 0
        return found

    @abstractmethod
    def within(self, ids: Ints, at: int) -> Flags:
        """``begins`` within the shard, of its first token anything."""


@dataclass(frozen=True)
class After(Borders):
    """A document begins after an id.

    Args:
        eos: that ends each document
    """

    eos: int

    def within(self, ids: Ints, at: int) -> Flags:
        found = np.zeros(len(ids), dtype=bool)
        found[1:] = ids[:-1] == self.eos
        return found


@dataclass(frozen=True)
class At(Borders):
    """A document begins at an id.

    Args:
        bos: that begins each document
    """

    bos: int

    def within(self, ids: Ints, at: int) -> Flags:
        return ids == self.bos


@dataclass(frozen=True)
class Listed(Borders):
    """An index lists the documents' starts, or their ends, which are the starts of the next.

    Args:
        path: of the index
        dtype: of its places, which ascend
        offset: bytes before the first
        n: how many
        unit: of the places: 1 for tokens, else bytes of a token
    """

    path: Path
    dtype: str
    offset: int
    n: int
    unit: int = 1

    def within(self, ids: Ints, at: int) -> Flags:
        places = mapped(self.path, self.dtype, self.offset, self.n)
        first, last = np.searchsorted(places, np.array([at, at + len(ids)], places.dtype) * self.unit)
        found = np.zeros(len(ids), dtype=bool)
        found[places[first:last].astype(np.int64) // self.unit - at] = True
        return found


@dataclass(frozen=True)
class Nowhere(Borders):
    """A shard is one document."""

    def within(self, ids: Ints, at: int) -> Flags:
        return np.zeros(len(ids), dtype=bool)


Documents = Literal["eos", "bos", "index", "joined"]
DTYPES = ("uint16", "uint32", "int32", "int64")
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_DTYPES = {4: "int32", 5: "int64", 8: "uint16"}
MEGATRON_HEAD = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents + 1
LLM_C = {20240520: "uint16", 20240801: "uint32"}
LLM_C_BYTES = 1024
NUMPY = b"\x93NUMPY"
NEAR = 2**16  # tokens at either end of a shard in which an id that ends documents is looked for
MOST_INDEX_BYTES = 2**26  # of index.json
TEXT = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", ".zst")
BESIDE = (".idx", ".index", ".metadata", ".loss", ".pkl")  # files that describe shards


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read.

    Args:
        path: of the setting that names the files
        eos: the tokenizer's id that ends a document
        bos: its id that begins one
        dtype: of the ids, for files that do not say it
        documents: how documents are marked; None to find out
    """

    path: str
    eos: int
    bos: int | None = None
    dtype: str | None = None
    documents: Documents | None = None

    def refuse(self, file: Path, rule: str, remedy: str) -> ConfigError:
        """The error for a file."""
        return ConfigError(self.path, str(file), rule, remedy)


@dataclass(frozen=True)
class Layout:
    """The ids in a file.

    Args:
        dtype: of an id
        offset: bytes before the first
        n_tokens: of the file; None for all bytes that follow
        index: documents' starts or ends, if the format lists them
        begun: whether ``bos`` begins each document
        tokenizer: fingerprint of the tokenizer, if the format has it
        digest: SHA-256 of the file, likewise
    """

    dtype: str
    offset: int = 0
    n_tokens: int | None = None
    index: Listed | None = None
    begun: bool = False
    tokenizer: str | None = None
    digest: str | None = None


@dataclass(frozen=True, eq=False)
class Shard:
    """The tokens of a file.

    Args:
        path: of the file
        dtype: of an id
        offset: bytes before the first
        n_tokens: how many
        borders: where documents begin
        tokenizer: fingerprint of the tokenizer that made the ids, if the file has it
        digest: SHA-256 of the file, likewise
    """

    path: Path
    dtype: str
    offset: int
    n_tokens: int
    borders: Borders
    tokenizer: str | None = None
    digest: str | None = None

    def ids(self, first: int, last: int) -> Ints:
        """The ids of the tokens ``first`` to ``last`` − 1, as int64."""
        return mapped(self.path, self.dtype, self.offset, self.n_tokens)[first:last].astype(np.int64)


def open_shard(path: Path, reading: Reading) -> Shard:
    """The tokens of a file, of which only the head and both ends are read.

    Args:
        path: of the file
        reading: how it is read

    Raises:
        ConfigError: at ``reading.path``, for a file that is empty, truncated, of a format that is not read, or of
            which the width of an id or the marks of documents are not known
    """
    layout = _layout(path, reading)
    n_tokens = _count(path, layout, reading)
    bare = Shard(path, layout.dtype, layout.offset, n_tokens, Nowhere(), layout.tokenizer, layout.digest)
    return Shard(**{**vars(bare), "borders": _borders(bare, layout, reading)})


def _layout(path: Path, reading: Reading) -> Layout:
    if path.suffix in TEXT:
        raise reading.refuse(path, "is text, and token ids are needed", "Tokenise it: blockwright tokenise FILES OUT")
    if path.suffix in BESIDE:
        raise reading.refuse(path, "describes a shard, and is none", "Name the shards alone: 'web/*.bin'")
    for recognise in FORMATS:
        if (layout := recognise(path, reading)) is not None:
            return layout
    if reading.dtype is None:
        rule = "has ids alone, and nothing that says how many bytes an id has"
        raise reading.refuse(path, rule, f"Write {_beside(reading, 'dtype')}=uint16 (or {', '.join(DTYPES[1:])})")
    return Layout(reading.dtype)


def _beside(reading: Reading, key: str) -> str:
    return f"{reading.path.rpartition('.')[0]}.{key}"


def _count(path: Path, layout: Layout, reading: Reading) -> int:
    """The number of tokens of a file, refused if its size is another."""
    width, held = np.dtype(layout.dtype).itemsize, path.stat().st_size - layout.offset
    n_tokens = held // width if layout.n_tokens is None else layout.n_tokens
    if held != n_tokens * width:
        rule = f"is truncated or damaged: {held:,} bytes of ids, where {n_tokens:,} ids of {width} bytes are due"
        if layout.n_tokens is None:
            rule = f"has {held:,} bytes of ids, which is no multiple of {width}, the bytes of {layout.dtype}"
        raise reading.refuse(path, rule, "Copy or write the file again")
    if not n_tokens:
        raise reading.refuse(path, "holds no tokens", "Leave the file out")
    return n_tokens


def _borders(shard: Shard, layout: Layout, reading: Reading) -> Borders:
    """How documents are marked: as configured, as the format says, or as the ids show."""
    kind = reading.documents or _marks(shard, layout, reading)
    if kind == "joined":
        return Nowhere()
    if kind == "eos":
        return After(reading.eos)
    if kind == "bos":
        return At(reading.eos if reading.bos is None else reading.bos)
    if layout.index is None:
        raise reading.refuse(shard.path, "has no index of documents", f"Write {_beside(reading, 'documents')}=eos")
    return layout.index


def _marks(shard: Shard, layout: Layout, reading: Reading) -> Documents:
    if layout.begun:
        return "bos"
    ends = (shard.ids(0, NEAR), shard.ids(max(0, shard.n_tokens - NEAR), shard.n_tokens))
    if any((ids == reading.eos).any() for ids in ends):
        return "eos"
    if layout.index is not None:
        return "index"
    rule = f"has no index of documents, and the tokenizer's id that ends one ({reading.eos}) is at neither end of it"
    remedy = (
        f"Use the tokenizer that made it, or write {_beside(reading, 'documents')}=joined if documents are not marked"
    )
    raise reading.refuse(shard.path, rule, remedy)


def _own(path: Path, reading: Reading) -> Layout | None:
    """A shard of ``blockwright tokenise``."""
    index = path.parent / INDEX
    if path.suffix != ".bin" or not index.is_file():
        return None
    try:
        content = parse_json(read_plain(index, reading.path, "", MOST_INDEX_BYTES).decode(), str(index))
        entry = content["shards"][path.name]
        dtype, n_tokens, digest = str(content["dtype"]), int(entry["tokens"]), str(entry["sha256"])
        tokenizer = str(content["tokenizer"])
    except (ValueError, KeyError, TypeError):
        rule = f"is not described by {INDEX} beside it"
        raise reading.refuse(path, rule, "Name shards that blockwright tokenise has finished") from None
    return Layout(_known(dtype, path, reading), n_tokens=n_tokens, tokenizer=tokenizer, digest=digest)


def _megatron(path: Path, reading: Reading) -> Layout | None:
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return None
    with index.open("rb") as file:
        head = file.read(MEGATRON_HEAD.size)
    if len(head) < MEGATRON_HEAD.size or not head.startswith(MEGATRON):
        raise reading.refuse(index, "is no index of Megatron", "Write both files again, or remove the .idx")
    _, version, code, n, n_borders = MEGATRON_HEAD.unpack(head)
    if version != 1 or code not in MEGATRON_DTYPES:
        rule = f"has version {version} and the type {code} of ids; version 1 with {MEGATRON_DTYPES} is read"
        raise reading.refuse(index, rule, "Write it again by Megatron's tools/preprocess_data.py")
    if index.stat().st_size != MEGATRON_HEAD.size + 12 * n + 8 * n_borders or not n:
        raise reading.refuse(index, "is empty, truncated or damaged", "Copy or write the file again")
    dtype = MEGATRON_DTYPES[code]
    width, after = np.dtype(dtype).itemsize, MEGATRON_HEAD.size + 4 * n
    last, pointer = mapped(index, "<i4", MEGATRON_HEAD.size, n)[-1], mapped(index, "<i8", after, n)[-1]
    # Where a document is of several sequences, their starts are not its own.
    listed = Listed(index, "<i8", after, n, width) if n_borders == n + 1 else None
    return Layout(dtype, n_tokens=int(pointer) // width + int(last), index=listed)


def _datatrove(path: Path, reading: Reading) -> Layout | None:
    if path.suffix != ".ds":
        return None
    beside, index = Path(f"{path}.metadata"), Path(f"{path}.index")
    dtype, n_tokens = reading.dtype, None
    if beside.is_file():
        try:
            lines = read_plain(beside, reading.path, "").decode().splitlines()
            dtype = {"2": "uint16", "4": "uint32"}[lines[0].rpartition("|")[2]]
            n_tokens = int(lines[1])
        except (ValueError, KeyError, IndexError):
            rule = "is no metadata of datatrove: a line NAME|BYTES, then the number of tokens"
            raise reading.refuse(beside, rule, f"Remove it, and write {_beside(reading, 'dtype')}=uint16") from None
    if dtype is None:
        rule = "has no .metadata beside it, which says how many bytes an id has"
        raise reading.refuse(path, rule, f"Write {_beside(reading, 'dtype')}=uint16 (or uint32)")
    n = index.stat().st_size // 8 if index.is_file() else 0
    return Layout(dtype, n_tokens=n_tokens, index=Listed(index, "<u8", 0, n) if n else None)


def _numpy(path: Path, reading: Reading) -> Layout | None:
    if _first_bytes(path, len(NUMPY)) != NUMPY:
        return None
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(file)
        except (ValueError, KeyError) as error:
            raise reading.refuse(
                path, f"has a header that cannot be read ({error})", "Write it by numpy.save"
            ) from None
        offset = file.tell()
    if len(shape) != 1:
        rule = f"is an array of the shape {shape}, and token ids have one dimension"
        raise reading.refuse(path, rule, "Save ids.ravel(), documents ended by eos")
    if not dtype.isnative:
        raise reading.refuse(path, f"has ids of {dtype}, in another byte order", "Save it as little-endian")
    return Layout(_known(dtype.name, path, reading), offset, shape[0])


def _llm_c(path: Path, reading: Reading) -> Layout | None:
    head = _first_bytes(path, 12)
    magic, _, n_tokens = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
    return Layout(LLM_C[magic], LLM_C_BYTES, n_tokens, begun=True) if magic in LLM_C else None


FORMATS: tuple[Callable[[Path, Reading], Layout | None], ...] = (_own, _megatron, _datatrove, _numpy, _llm_c)


def _known(dtype: str, path: Path, reading: Reading) -> str:
    if dtype not in DTYPES:
        raise reading.refuse(path, f"has ids of {dtype}; {', '.join(DTYPES)} are read", "Write it as one of these")
    return dtype


def _first_bytes(path: Path, n: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(n)
    except OSError as error:
        raise ConfigError(str(path), error.strerror, "cannot be read", "Correct its permissions") from None
