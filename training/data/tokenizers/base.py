"""The interface of a tokenizer: text to ids and back, an end-of-document id, and the number of bytes of each id.

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
