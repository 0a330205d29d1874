"""Byte-level byte-pair encoding, trained on the train split with Hugging Face's ``tokenizers`` (extra ``bpe``).

The end of a document is an extra id above the trained vocabulary, unknown to the library: no text can encode to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import require
from blockwright.registry.ranges import Count
from blockwright.training.data.tokenizers.files import byte_alphabet
from blockwright.training.data.tokenizers.tokenizer import Tokenizer, need_room, token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

# Minimum characters of a part: the library keeps about a hundred bytes per token that it encodes, and takes 256 parts
# at once in training.
PART = 2**14
# Where GPT-2's pattern always ends a word: after a single line end, before a single space, and, for text with neither,
# between a letter or digit and the punctuation mark after it. Cutting there changes no token.
SEAM = re.compile(
    r"(?<=\S)\n(?=\S)|(?<=\S)(?= \S)|(?<=[A-Za-z0-9\u4e00-\u9fff])(?=[],.;:!?)}\"<\u3001\u3002\uff0c\uff01\uff1f])"
)


class BPE(Tokenizer):
    """GPT-2's scheme: split text into words, then merge the most frequent neighbours, starting from single bytes.

    Any text survives a round trip. On a small corpus the merges run out before the vocabulary is full; the remaining
    ids are padding. Unlike GPT-2's, the vocabulary has no special token: ``eos`` is the last id.

    Args:
        vocab_size: 256 bytes + merges + the end of a document

    Raises:
        ConfigError: at ``data.tokenizer``, if ``tokenizers`` is not installed; at ``data.tokenizer.vocab_size``,
            below 257
    """

    kind: ClassVar[str] = "bpe"

    def __init__(self, vocab_size: Count = 4096) -> None:
        need_room(vocab_size, 257, "256 bytes and the end of a document need 257 ids")
        require("bpe", "tokenizers", path="data.tokenizer", value="bpe", otherwise="or use data/tokenizer=bytes")
        self.vocab_size = vocab_size
        self.eos = vocab_size - 1
        self._state: str | None = None  # the library's JSON; its objects are created from it on demand

    @property
    def fitted(self) -> bool:
        return self._state is not None

    def fit(self, texts: Iterable[str]) -> None:
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, pre_tokenizers, trainers

        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - 1,  # the last id is eos
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        engine.train_from_iterator((part for text in texts for part in self.parts([text])), trainer)
        # The library warns in every forked loader process, though none of them tokenises.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._adopt(engine.to_str())

    def parts(self, pieces: Iterable[str]) -> Iterator[str]:
        held, least = "", PART  # no cut within the first `least` characters
        for piece in pieces:
            held, begin = held + piece, 0
            while seam := SEAM.search(held, begin + least):
                yield held[begin : seam.end()]
                begin, least = seam.end(), PART
            held = held[begin:]
            least = max(PART, len(held) - 2)
        if held:
            yield held

    def encode(self, text: str) -> npt.NDArray[Any]:
        # "fast" omits character offsets, which are not used, and takes half the time.
        ids = [i for part in self.parts([text]) for i in self._engine.encode_batch_fast([part])[0].ids]
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: npt.ArrayLike) -> str:
        spelling = self._spelling
        known = (i for i in np.asarray(ids, dtype=np.int64).tolist() if 0 <= i < len(spelling))
        return b"".join(spelling[i] for i in known).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        n = np.zeros(self.vocab_size, dtype=np.int64)
        n[: len(self._spelling)] = [len(word) for word in self._spelling]
        return n

    def to_json(self) -> dict[str, Any]:
        state: dict[str, Any] = {"kind": self.kind, "vocab_size": self.vocab_size}
        return state if self._state is None else {**state, "tokenizers": self._state}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> BPE:
        self = cls(state["vocab_size"])
        if "tokenizers" in state:
            self._adopt(state["tokenizers"])
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}  # spawned ranks rebuild it

    def _adopt(self, state: str) -> None:
        self._state = state
        for name in ("_engine", "_spelling"):
            self.__dict__.pop(name, None)

    @cached_property
    def _engine(self) -> Engine:
        from tokenizers import Tokenizer as Engine

        if self._state is None:
            raise RuntimeError("BPE has no vocabulary yet: call fit, or rebuild it from a checkpoint's state")
        return Engine.from_str(self._state)

    @cached_property
    def _spelling(self) -> list[bytes]:
        """The bytes of each trained id."""
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        words = sorted(self._engine.get_vocab(), key=self._engine.get_vocab().__getitem__)
        return [bytes(byte_of[character] for character in word) for word in words]
