"""A pretrained tokenizer: a ``tokenizer.json``, run by Hugging Face's ``tokenizers`` (extra ``hf``)."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import ConfigError, did_you_mean, require
from blockwright.registry.folder import MAX_FILE_BYTES
from blockwright.registry.limits import read_plain
from blockwright.registry.ranges import Count
from blockwright.training.data.tokenizers import companions
from blockwright.training.data.tokenizers.companions import model_config, resolve
from blockwright.training.data.tokenizers.files import COMPANIONS, SPECIAL, byte_alphabet, special
from blockwright.training.data.tokenizers.tokenizer import Tokenizer, need_room, token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

SPACE = "\u2581"  # SentencePiece's space


class Pretrained(Tokenizer):
    """The tokenizer of a model to be fine-tuned.

    Special tokens are never recognised in a text: their strings are encoded as ordinary text, and no token is added
    around it. A document is encoded as a whole, so a long one takes about a hundred bytes of memory per token.

    The files beside it (settings, chat template, generation_config.json; companions.py lists them) and every
    special token are part of its state: they stay with the model in checkpoints and in exports.

    Bytes of a token are counted on its own spelling. Tokenizers that prepend a space to a text count that too.

    Args:
        file: path of tokenizer.json
        eos: the token that ends a document; null for ``eos_token`` of the files beside it, or the first
            ``eos_token_id`` of generation_config.json or config.json
        vocab_size: ids; null for those of the file, more to pad the vocabulary

    Raises:
        ConfigError: at ``data.tokenizer.file``, if it cannot be read; at ``data.tokenizer.eos``, if nothing ends a
            document; at ``data.tokenizer.vocab_size``, if the file has more ids; at a file beside it that is damaged
    """

    kind: ClassVar[str] = "pretrained"

    def __init__(self, file: str, eos: str | None = None, vocab_size: Count | None = None) -> None:
        require("hf", "tokenizers", path="data.tokenizer", value="pretrained")
        path = Path(file).expanduser()
        try:
            self._state = read_plain(path, "data.tokenizer.file", "", MAX_FILE_BYTES).decode()
            words = self._words
        except Exception as error:  # the library raises plain Exception for what it cannot parse
            reason = error.rule if isinstance(error, ConfigError) else error
            rule = f"cannot be read as a tokenizer.json ({reason})"
            raise ConfigError("data.tokenizer.file", file, rule, "Name the tokenizer.json of the model") from None
        self.companions = companions.read(path.parent)
        special = resolve(self.companions, model_config(path.parent), words, self.special_words, eos)
        self.special = replace(special, ends=tuple(i for i in special.ends if i in words.values()))
        if (eos and eos not in words) or not self.special.ends:
            rule = "a word of the vocabulary must end a document"
            raise ConfigError("data.tokenizer.eos", eos, rule, did_you_mean(eos, self.special_words))
        self.eos = self.special.ends[0]
        self._eos_word = next(word for word, i in words.items() if i == self.eos)
        need = max(words.values()) + 1
        self.vocab_size = need if vocab_size is None else vocab_size
        need_room(self.vocab_size, need, f"{path.name} has {need} ids")

    @property
    def bos(self) -> int | None:
        return self.special.bos

    @property
    def ends(self) -> frozenset[int]:
        return frozenset(self.special.ends)

    def encode(self, text: str) -> npt.NDArray[Any]:
        ids = self._engine.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: npt.ArrayLike) -> str:
        known = set(self._words.values()) - {self.eos}
        return self._engine.decode([i for i in np.asarray(ids, dtype=np.int64).tolist() if i in known])

    def token_bytes(self) -> npt.NDArray[np.int64]:
        n = np.zeros(self.vocab_size, dtype=np.int64)
        by_bytes = "ByteLevel" in self._state
        for word, i in self._words.items():
            n[i] = 0 if word in self.special_words else _spelt_bytes(word, by_bytes)
        return n

    def to_json(self) -> dict[str, Any]:
        config = {"eos_token": self._eos_word}
        state = {"kind": self.kind, "vocab_size": self.vocab_size, "eos": self.eos, "config": config}
        return {**state, "tokenizers": self._state, SPECIAL: asdict(self.special), COMPANIONS: self.companions}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Pretrained:
        self = cls.__new__(cls)
        self.vocab_size, self.eos, self._state = state["vocab_size"], state["eos"], state["tokenizers"]
        self._eos_word = state["config"]["eos_token"]
        self.special, self.companions = special(state), companions.check(state.get(COMPANIONS, {}), "data.tokenizer")
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}  # spawned ranks rebuild it

    @cached_property
    def _engine(self) -> Engine:
        from tokenizers import Tokenizer as Engine

        engine = Engine.from_str(self._state)
        engine.encode_special_tokens = True  # as ordinary words
        engine.no_truncation()
        engine.no_padding()
        return engine

    @cached_property
    def _words(self) -> dict[str, int]:
        return self._engine.get_vocab(with_added_tokens=True)

    @cached_property
    def special_words(self) -> dict[str, int]:
        tokens = self._engine.get_added_tokens_decoder()
        return {token.content: i for i, token in tokens.items() if token.special}


_BYTES = frozenset(byte_alphabet())


def _spelt_bytes(word: str, by_bytes: bool) -> int:
    """Bytes of the text of a token."""
    if by_bytes and set(word) <= _BYTES:
        return len(word)  # one character per byte
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return 1  # SentencePiece's form of a byte
    return len(word.replace(SPACE, " ").encode())
