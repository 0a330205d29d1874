"""UTF-8 bytes as tokens: no training, no dependency, any text, one byte per token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry.ranges import Count
from blockwright.training.data.tokenizers.base import Tokenizer, need_room, token_dtype


class Bytes(Tokenizer):
    """The 256 bytes, and 256 for the end of a document.

    Args:
        vocab_size: 257, or more to pad the vocabulary (e.g. to a multiple of 64)

    Raises:
        ConfigError: at ``data.tokenizer.vocab_size``, below 257
    """

    kind: ClassVar[str] = "bytes"

    def __init__(self, vocab_size: Count = 257) -> None:
        need_room(vocab_size, 257, "256 bytes and the end of a document need 257 ids")
        self.vocab_size = vocab_size
        self.eos = 256

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        yield from pieces

    def encode(self, text: str) -> npt.NDArray[Any]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: npt.ArrayLike) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return (np.arange(self.vocab_size) < 256).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Bytes:
        return cls(state["vocab_size"])
