"""Characters as tokens: a small readable vocabulary, for experiments on one corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry.ranges import Count
from blockwright.training.data.tokenizers.base import Tokenizer, need_room, token_dtype

UNKNOWN, EOS, FIRST = 0, 1, 2


class Chars(Tokenizer):
    """The characters of the train split, sorted, after two special ids: 0 unknown, 1 end of document.

    A character missing in the train split becomes the unknown id, so only text of known characters survives a round
    trip. The unknown id counts as one byte, the minimum of a character.

    Args:
        vocab_size: maximum number of characters plus two; the rest is padding
    """

    kind: ClassVar[str] = "chars"

    def __init__(self, vocab_size: Count = 128) -> None:
        need_room(vocab_size, FIRST + 1, "the unknown character, the end of a document and one character need 3 ids")
        self.vocab_size = vocab_size
        self.eos = EOS
        self._characters: str | None = None

    @property
    def fitted(self) -> bool:
        return self._characters is not None

    @property
    def characters(self) -> str:
        """The known characters in the order of their ids, which begin at 2."""
        if self._characters is None:
            raise RuntimeError("Chars knows no character yet: call fit, or rebuild it from a checkpoint's state")
        return self._characters

    def check(self, texts: Iterable[str]) -> None:
        self._learn(texts)

    def fit(self, texts: Iterable[str]) -> None:
        self._characters = self._learn(texts)

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        yield from pieces

    def encode(self, text: str) -> npt.NDArray[Any]:
        known, wanted = _code_points(self.characters), _code_points(text)
        place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        ids = np.where(known[place] == wanted, place + FIRST, UNKNOWN)
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: npt.ArrayLike) -> str:
        words = {UNKNOWN: "\ufffd", **{i + FIRST: c for i, c in enumerate(self.characters)}}
        return "".join(words.get(i, "") for i in np.asarray(ids, dtype=np.int64).tolist())

    def token_bytes(self) -> npt.NDArray[np.int64]:
        n = np.zeros(self.vocab_size, dtype=np.int64)
        n[UNKNOWN] = 1
        n[FIRST : FIRST + len(self.characters)] = [len(c.encode()) for c in self.characters]
        return n

    def to_json(self) -> dict[str, Any]:
        state: dict[str, Any] = {"kind": self.kind, "vocab_size": self.vocab_size}
        return state if self._characters is None else {**state, "characters": self._characters}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Chars:
        self = cls(state["vocab_size"])
        self._characters = state.get("characters")
        return self

    def _learn(self, texts: Iterable[str]) -> str:
        known: set[str] = set()
        for text in texts:
            known.update(text)
        characters = "".join(sorted(known))
        need = max(len(characters), 1) + FIRST
        need_room(self.vocab_size, need, f"the train split has {len(characters)} characters, and two ids are special")
        return characters or "\n"  # never empty, so that encode needs no special case


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
