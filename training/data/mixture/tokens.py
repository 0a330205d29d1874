"""Runs of tokens behind one interface, and windows cut from them: around a ring to train, along a line to measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from blockwright.registry.errors import ConfigError
from blockwright.training.data.fingerprint import digest, of_file
from blockwright.training.data.mixture.shards import Flags, Shard
from blockwright.training.data.packing import Ints, shaped
from blockwright.training.data.tokenizers.tokenizer import Tokenizer, vocabulary_of
from blockwright.training.data.windows import Array, Making, WindowBatches


class Tokens(ABC):
    """A run of token ids that can be read anywhere: files, or a package's own store."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """How many."""

    @abstractmethod
    def read(self, first: int, last: int) -> tuple[Ints, Flags]:
        """The ids of the tokens ``first`` to ``last`` − 1, and whether each begins a document.

        The first token of all begins one. Of the first that is read it need not be known else: a window begins one.
        """

    @abstractmethod
    def identity(self) -> Any:
        """What determines the ids, as plain types, without reading them; it does not depend on where they are."""

    @abstractmethod
    def contents(self) -> str:
        """Digest of all ids, for which all of them are read."""

    def place(self, at: int) -> str:
        """Where a token is, for messages."""
        return f"token {at}"


class Shards(Tokens):
    """The tokens of files, one after the other.

    Args:
        shards: in order, at least one
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self._ends: Ints = np.cumsum([shard.n_tokens for shard in shards])

    @property
    def n_tokens(self) -> int:
        return int(self._ends[-1])

    def read(self, first: int, last: int) -> tuple[Ints, Flags]:
        ids, begins = np.empty(last - first, dtype=np.int64), np.empty(last - first, dtype=bool)
        for shard, at, start, stop in self._parts(first, last):
            part = slice(start - first, stop - first)
            ids[part] = shard.ids(start - at, stop - at)
            begins[part] = shard.borders.begins(ids[part], start - at)
        return ids, begins

    def _parts(self, first: int, last: int) -> Iterator[tuple[Shard, int, int, int]]:
        """The shards that hold a stretch: each with the place of its first token, and what it holds of the stretch."""
        which = int(np.searchsorted(self._ends, first, side="right"))
        while first < last:
            end = int(self._ends[which])
            yield self.shards[which], end - self.shards[which].n_tokens, first, min(last, end)
            first, which = end, which + 1

    def identity(self) -> Any:
        return [[shard.path.name, shard.n_tokens, shard.digest] for shard in self.shards]

    def contents(self) -> str:
        return digest([of_file(shard.path) for shard in self.shards])

    def place(self, at: int) -> str:
        shard, first, *_ = next(self._parts(at, at + 1))
        return f"{shard.path}, token {at - first:,}"


@dataclass(frozen=True, eq=False)
class Stretch(Tokens):
    """A part of a run of tokens.

    Args:
        whole: the run
        first, last: the tokens ``first`` to ``last`` − 1 of it
    """

    whole: Tokens
    first: int
    last: int

    @property
    def n_tokens(self) -> int:
        return self.last - self.first

    def read(self, first: int, last: int) -> tuple[Ints, Flags]:
        ids, begins = self.whole.read(self.first + first, self.first + last)
        begins[:1] |= first == 0
        return ids, begins

    def identity(self) -> Any:
        return [self.whole.identity(), self.first, self.last]

    def contents(self) -> str:
        return digest(self.whole.contents(), self.first, self.last)

    def place(self, at: int) -> str:
        return self.whole.place(self.first + at)


@dataclass(frozen=True)
class Cut:
    """Windows cut from tokens.

    Args:
        ids: of the tokens, anything where there is none [B, length]
        begins: whether a document begins there; anything in the first column
        real: whether there is a token
    """

    ids: Ints
    begins: Flags
    real: Flags


class Cutting(ABC):
    """Cuts windows of consecutive tokens.

    Args:
        vocab_size: ids are below it
        path: of the setting that names the tokens, for messages
    """

    def __init__(self, vocab_size: int, path: str) -> None:
        self.vocab_size, self.path = vocab_size, path

    @abstractmethod
    def window(self, at: int, length: int) -> tuple[Ints, Flags]:
        """The window that begins at an address: fewer tokens than ``length`` where they end."""

    @abstractmethod
    def place(self, at: int, column: int) -> tuple[str, str]:
        """The name of the source and the place of a token of the window at an address, for messages."""

    def cut(self, addresses: Sequence[int], length: int) -> Cut:
        """The windows that begin at addresses, −1 for an empty one.

        Raises:
            ConfigError: at ``path``, for an id that the vocabulary has not
        """
        shape = (len(addresses), length)
        ids, begins, real = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
        for row, at in enumerate(addresses):
            if at >= 0:
                found, flags = self.window(at, length)
                ids[row, : len(found)], begins[row, : len(found)], real[row, : len(found)] = found, flags, True
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            self._refuse(addresses, ids)
        return Cut(ids, begins, real)

    def _refuse(self, addresses: Sequence[int], ids: Ints) -> None:
        row, column = np.argwhere((ids >= self.vocab_size) | (ids < 0))[0].tolist()
        name, place = self.place(addresses[row], column)
        rule = f"is an id that the vocabulary of {self.vocab_size:,} has not ({place})"
        remedy = "Use the tokenizer that made the file, or its dtype"
        raise ConfigError(self.path.format(name=name), int(ids[row, column]), rule, remedy)


class Rings(Cutting):
    """Windows of several sources in one address space, each a ring: its end continues at its beginning.

    Args:
        sources: name → tokens, in the order of their addresses
        vocab_size: ids are below it
        path: of the setting of a source, with ``{name}`` in it
    """

    def __init__(self, sources: dict[str, Tokens], vocab_size: int, path: str) -> None:
        super().__init__(vocab_size, path)
        self.sources = sources
        self._names, self._tokens = [*sources], [*sources.values()]
        self._sizes = [tokens.n_tokens for tokens in self._tokens]
        self._bases = np.cumsum([0, *self._sizes[:-1]])

    def window(self, at: int, length: int) -> tuple[Ints, Flags]:
        k, first = self._find(at)
        last = min(first + length, self._sizes[k])
        ids, begins = self._tokens[k].read(first, last)
        if (left := length - (last - first)) == 0:
            return ids, begins
        further = self._tokens[k].read(0, left)  # a ring is longer than a window
        return np.concatenate([ids, further[0]]), np.concatenate([begins, further[1]])

    def place(self, at: int, column: int) -> tuple[str, str]:
        k, first = self._find(at)
        return self._names[k], self._tokens[k].place((first + column) % self._sizes[k])

    def _find(self, at: int) -> tuple[int, int]:
        """The source of an address, and its token."""
        k = int(np.searchsorted(self._bases, at, side="right")) - 1
        return k, at - int(self._bases[k])


class Line(Cutting):
    """Windows of one source, each token once.

    Args:
        name: of the source
        tokens: of it
        vocab_size: ids are below it
        path: of the setting of a source, with ``{name}`` in it
    """

    def __init__(self, name: str, tokens: Tokens, vocab_size: int, path: str) -> None:
        super().__init__(vocab_size, path)
        self.name, self.tokens = name, tokens

    def window(self, at: int, length: int) -> tuple[Ints, Flags]:
        return self.tokens.read(at, min(at + length, self.tokens.n_tokens))

    def place(self, at: int, column: int) -> tuple[str, str]:
        return self.name, self.tokens.place(at + column)


# --- windows of a mixture as a torch data set ---


class MixtureWindows(WindowBatches):
    """Batches of windows cut from several sources, or from one.

    Args:
        cutting: cuts them
        sequence_length: T, tokens of a window
        token_bytes: UTF-8 bytes of each id [V]
        eos: the id of padding
        making: how windows are made of the tokens
    """

    def __init__(self, cutting: Cutting, sequence_length: int, token_bytes: Ints, eos: int, making: Making) -> None:
        super().__init__(sequence_length, token_bytes, making)
        self.cutting, self.eos = cutting, eos

    def _cut(self, offsets: list[int], length: int) -> dict[str, Array]:
        cut = self.cutting.cut(offsets, length + 1)
        begins = np.zeros_like(cut.begins) if self.making.joined else cut.begins & cut.real
        return shaped(np.where(cut.real, cut.ids, self.eos), begins, cut.real, self.token_bytes)


# --- whether a tokenizer is the one that made some ids: they are decoded and encoded again ---


SAMPLES = 20
LENGTH = 256  # tokens of a sample
LEAST = 0.9  # a tokenizer that normalises text, by NFKC for instance, gives a little less than all


def ids_digest(tokenizer: Tokenizer) -> str:
    """Digest of what determines the ids of a text, and the end of a document; room in the vocabulary does not."""
    state = vocabulary_of(tokenizer.to_json())
    return digest({key: value for key, value in state.items() if key != "vocab_size"}, tokenizer.eos)


def samples(tokens: Tokens, n: int = SAMPLES, length: int = LENGTH) -> list[list[int]]:
    """Ids of n stretches, evenly spaced, each within a document and from its start, if one starts there."""
    firsts = np.linspace(0, max(0, tokens.n_tokens - length), n).astype(int).tolist()
    return [_within_a_document(tokens, first, min(first + length, tokens.n_tokens)) for first in dict.fromkeys(firsts)]


def _within_a_document(tokens: Tokens, first: int, last: int) -> list[int]:
    ids, begins = tokens.read(first, last)
    starts = [*(np.flatnonzero(begins[1:]) + 1).tolist(), len(ids)]
    begin, end = (0, starts[0]) if starts[0] >= len(ids) // 2 else (starts[0], starts[1])
    return ids[begin:end].tolist()


def agreement(tokens: Tokens, tokenizer: Tokenizer) -> float:
    """The share of ids that come back when stretches of the tokens are decoded and encoded again."""
    kept = total = 0
    for sample in samples(tokens):
        ids = [i for i in sample if i not in tokenizer.ends and i != tokenizer.bos]
        again = tokenizer.encode(tokenizer.decode(ids)).tolist()
        matching = SequenceMatcher(None, ids, again, autojunk=False).get_matching_blocks()
        kept, total = kept + sum(block.size for block in matching), total + len(ids)
    return kept / max(total, 1)


def refuse_other(tokens: Tokens, tokenizer: Tokenizer, path: str) -> None:
    """Refuse tokens that another tokenizer made, or that the vocabulary has not.

    Args:
        tokens: of a source
        tokenizer: of the run
        path: of the setting that names them

    Raises:
        ConfigError: at ``path``
    """
    remedy = "Use the tokenizer that made the files: data/tokenizer=pretrained data.tokenizer.file=…/tokenizer.json"
    highest = max(max(sample) for sample in samples(tokens))
    lowest = min(min(sample) for sample in samples(tokens))
    if highest >= tokenizer.vocab_size or lowest < 0:
        wrong = lowest if lowest < 0 else highest
        rule = f"has ids that the vocabulary of {tokenizer.vocab_size:,} has not"
        raise ConfigError(path, wrong, rule, f"{remedy}; or correct dtype")
    if (share := agreement(tokens, tokenizer)) < LEAST:
        rule = f"was made by another tokenizer: {share:.1%} of sampled ids come back when decoded and encoded again"
        raise ConfigError(path, f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids", rule, remedy)
