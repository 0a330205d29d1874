"""What a tokenizer is: text to ids and back, an end-of-document id, and how many bytes each id stands for.

A tokenizer's whole state is plain JSON: it travels in the checkpoint, and ``rebuild.py`` makes it anew from that,
with no files at hand and no pickle.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from interop.tokenizer import COMPANIONS, SPECIAL
from registry.errors import ConfigError


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest dtype, of two, that holds every id: tokens are stored on disk in it."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def vocabulary_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tokenizer's state that decides ids and text, without what is kept for generation and export."""
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
        kind: the name under which a checkpoint finds the class again
        vocab_size: ids lie in [0, vocab_size). It is *declared*, since the model is sized by it before any text is
            read; ids that nothing uses are padding
        eos: the id that ends a document. ``encode`` never gives it, whatever the text spells
    """

    kind: ClassVar[str]
    vocab_size: int
    eos: int

    @property
    def bos(self) -> int | None:
        """The id that begins a document, by default the one that ends the document before; None if there is none."""
        return self.eos

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a generated text: ``eos``, and whatever else the model was taught to end a turn with."""
        return frozenset({self.eos})

    @property
    def special_words(self) -> Mapping[str, int]:
        """Words that stand for one special token each. ``encode`` and ``decode`` never give them."""
        return {}

    def stop_tokens(self, stops: Iterable[str] = ()) -> frozenset[int]:
        """Ids at which generation stops: ``ends``, and special tokens among the stop strings, which no text spells.

        Args:
            stops: strings that end a text
        """
        return self.ends | {self.special_words[stop] for stop in stops if stop in self.special_words}

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether it knows its vocabulary: always, or only after ``fit`` or ``from_json``."""

    @abstractmethod
    def check(self, texts: Iterable[str]) -> None:
        """Raise the error that ``fit`` would raise on these texts, where that can be known without much work.

        Args:
            texts: documents of the train split, each in its ``parts``
        """

    @abstractmethod
    def fit(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary.

        Args:
            texts: documents of the train split, and of no other, each in its ``parts``

        Raises:
            ConfigError: at ``data.tokenizer.vocab_size``, when the texts do not fit into it
        """

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        """A document that comes in pieces → parts whose ids, one part after the other, are the ids of the document.

        Here the document in one part, which is always right. Override it where a text can be cut, so that a large
        document is never held whole.

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
        """UTF-8 bytes that each id stands for [vocab_size]; 0 for ``eos`` and padding.

        A loss in nats a token becomes bits a byte by it, and only those compare between tokenizers.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The state in plain types, with ``kind`` and ``vocab_size``; before ``fit`` only those two."""

    @classmethod
    @abstractmethod
    def from_json(cls, state: dict[str, Any]) -> Tokenizer:
        """The tokenizer that ``to_json`` described."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of the vocabulary if fitted, else of what ``fit`` will be told."""
        return hashlib.sha256(json.dumps(vocabulary_of(self.to_json()), sort_keys=True).encode()).hexdigest()
