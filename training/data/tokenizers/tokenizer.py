"""Tokenizers: text to ids and back, an end-of-document id, the number of bytes of each id; of bytes and characters.

A tokenizer's whole state is plain JSON: it is stored in checkpoints, and ``rebuild.py`` recreates it without files or
pickle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count
from blockwright.training.data.fingerprint import digest
from blockwright.training.data.tokenizers.files import COMPANIONS, SPECIAL


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smaller of two dtypes that holds every id, for tokens on disk."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


LEFT_OUT = {COMPANIONS: "files that exports and templates use: a format that uses one has its text in its own identity"}


def vocabulary_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tokenizer's state that determines ids and text, without what is kept for generation and export."""
    return {key: value for key, value in state.items() if key not in (COMPANIONS, SPECIAL)}


def need_room(vocab_size: int, least: int, why: str) -> None:
    """Refuse a vocabulary smaller than ``least`` ids.

    Raises:
        ConfigError: at ``data.tokenizer.vocab_size``
    """
    if vocab_size < least:
        raise ConfigError(
            "data.tokenizer.vocab_size", vocab_size, why, f"Set data.tokenizer.vocab_size={least}, or more"
        )


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: the name of the class in checkpoints
        vocab_size: ids are in [0, vocab_size). It is *declared*, since the model is sized by it before any text is
            read; unused ids are padding
        eos: the id that ends a document. ``encode`` never returns it, for any text
        companions: files beside it (companions.py), such as the template of a checkpoint's chat format: name → text
    """

    kind: ClassVar[str]
    vocab_size: int
    eos: int
    companions: Mapping[str, str] = MappingProxyType({})

    @property
    def bos(self) -> int | None:
        """The id that begins a document, by default the one that ends the previous document; None if there is none."""
        return self.eos

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a generated text: ``eos``, and the model's end-of-turn tokens."""
        return frozenset({self.eos})

    @property
    def special_words(self) -> Mapping[str, int]:
        """Strings of special tokens → ids. ``encode`` and ``decode`` never produce them."""
        return {}

    def stop_tokens(self, stops: Iterable[str] = ()) -> frozenset[int]:
        """Ids at which generation stops: ``ends``, and special tokens among the stop strings.

        Args:
            stops: strings that end a text
        """
        return self.ends | {self.special_words[stop] for stop in stops if stop in self.special_words}

    @property
    def fitted(self) -> bool:
        """Whether the vocabulary is known: by default always. Override it if it is only after ``fit``."""
        return True

    def check(self, texts: Iterable[str]) -> None:  # noqa: B027 # by default nothing can be wrong
        """Raise the error that ``fit`` would raise on these texts, if that can be found without much work.

        Args:
            texts: documents of the train split, each in its ``parts``
        """

    def fit(self, texts: Iterable[str]) -> None:  # noqa: B027 # by default there is nothing to learn
        """Learn the vocabulary.

        Args:
            texts: documents of the train split, and of no other, each in its ``parts``

        Raises:
            ConfigError: at ``data.tokenizer.vocab_size``, when the texts do not fit into it
        """

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        """Split a document into parts whose concatenated ids are the ids of the document.

        By default one part, which is always right. Override it if texts can be cut, so that a large document is never
        held in memory.

        Args:
            pieces: of one document, cut anywhere
        """
        text = "".join(pieces)
        if text:
            yield text

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[Any]:
        """The ids of a text, without ``eos``.

        Returns:
            ids [n] in ``token_dtype(vocab_size)``
        """

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids [n]. Never fails: ``eos`` and padding give nothing, broken UTF-8 gives U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of each id [vocab_size]; 0 for ``eos`` and padding.

        Converts a loss in nats per token to bits per byte, which is comparable between tokenizers.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The state in plain types, with ``kind`` and ``vocab_size``; before ``fit`` only those two."""

    @classmethod
    @abstractmethod
    def from_json(cls, state: dict[str, Any]) -> Tokenizer:
        """The tokenizer described by ``to_json``'s result."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of the whole state but ``LEFT_OUT``: if fitted of the vocabulary and the special tokens,
        which formats write, else of the arguments of ``fit``."""
        return digest({key: value for key, value in self.to_json().items() if key not in LEFT_OUT})


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
