"""Shards of tokens as other tools write them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

EOS = 256  # of the byte tokenizer


def documents(n: int, seed: int = 0, letters: bytes = b"abcdefgh .\n") -> list[list[int]]:
    """Token ids of n documents of ASCII text, without ends."""
    random = np.random.RandomState(seed)
    return [random.choice(list(letters), random.randint(3, 60)).tolist() for _ in range(n)]


def flat(docs: list[list[int]]) -> list[int]:
    """The ids of documents, each followed by ``EOS``."""
    return [i for doc in docs for i in (*doc, EOS)]


def raw(path: Path, docs: list[list[int]], dtype: str = "uint16") -> Path:
    """nanoGPT's and OLMo's: ids alone."""
    np.array(flat(docs), dtype).tofile(path)
    return path


def npy(path: Path, docs: list[list[int]], dtype: str = "int32") -> Path:
    np.save(path, np.array(flat(docs), dtype))
    return path


def llm_c(path: Path, docs: list[list[int]], magic: int = 20240520, dtype: str = "uint16") -> Path:
    """Documents begin with the id."""
    ids = np.array([i for doc in docs for i in (EOS, *doc)], dtype)
    head = np.zeros(256, np.int32)
    head[:3] = magic, 1, len(ids)
    path.write_bytes(head.tobytes() + ids.tobytes())
    return path


def megatron(path: Path, docs: list[list[int]], eod: bool = False, code: int = 8, dtype: str = "uint16") -> Path:
    docs = [[*doc, EOS] for doc in docs] if eod else docs
    lengths = np.array([len(doc) for doc in docs], np.int32)
    pointers = (np.cumsum(lengths) - lengths).astype(np.int64) * np.dtype(dtype).itemsize
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(docs), len(docs) + 1)
    borders = np.arange(len(docs) + 1, dtype=np.int64)
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + borders.tobytes())
    np.array([i for doc in docs for i in doc], dtype).tofile(path)
    return path


def datatrove(path: Path, docs: list[list[int]], width: int = 2, eos: bool = True) -> Path:
    docs = [[*doc, EOS] for doc in docs] if eos else docs
    ids = np.array([i for doc in docs for i in doc], {2: "uint16", 4: "uint32"}[width])
    ids.tofile(path)
    np.cumsum([len(doc) for doc in docs]).astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"name|of it|{width}\n{len(ids)}\n{len(ids)} T")
    return path
