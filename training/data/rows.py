"""Conversations as documents of annotated tokens, packed whole into rows of equal length.

A token is written as 2·id, plus 1 where it is scored.

Letters: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.kernels.scoring import PADDING as NO_DOCUMENT
from blockwright.registry.errors import ConfigError
from blockwright.training.data.chat.formats import Chat, Message, answered, encode
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.fingerprint import digest, state
from blockwright.training.data.order import PADDING, over_epochs
from blockwright.training.data.packing import Ints, Stream
from blockwright.training.data.tokenizers.tokenizer import Tokenizer, token_dtype

LEFT_OUT = {
    "tokenizer": "its own fingerprint is compared",
    "chat": "its own identity is compared",
    "counts": "it is a result",
}


class Rendering(Tokenizer):
    """Encodes the JSON of conversations in a chat format.

    A conversation longer than a row loses its last turns, down to one that ends with a scored answer; never a part of a
    turn. If none is left, it is dropped. ``counts`` says how often both happened.

    Args:
        tokenizer: of the texts
        chat: the format
        longest: tokens of a row
    """

    kind: ClassVar[str] = "rendered"

    def __init__(self, tokenizer: Tokenizer, chat: Chat, longest: int) -> None:
        self.tokenizer, self.chat, self.longest = tokenizer, chat, longest
        self.vocab_size, self.eos = 2 * tokenizer.vocab_size, 2 * tokenizer.eos
        self.counts: Counter[str] = Counter()
        chat.prepare(tokenizer)
        chat.check_scores()

    @property
    def fitted(self) -> bool:
        return self.tokenizer.fitted

    def read(self, text: str) -> list[Conversation]:
        """The conversations of a document."""
        return [Conversation.from_json(text)]

    def check(self, texts: Iterable[str]) -> None:
        """Refuse texts that the tokenizer does not cover, and conversations without a scored turn."""
        conversations = [each for text in texts for each in self.read(text)]
        self.tokenizer.check(self._contents(conversations))
        for each in conversations:
            refuse_unscored(each, any(map(answered, each.messages)))
            self.chat.render(each.messages, each.tools)

    def fit(self, texts: Iterable[str]) -> None:
        self.tokenizer.fit(self._contents(each for text in texts for each in self.read(text)))

    def encode(self, text: str) -> npt.NDArray[Any]:
        conversation = Conversation.from_json(text)
        ids, scored = self.encoded(conversation, conversation.messages)
        refuse_unscored(conversation, bool(scored.any()))
        self.counts["conversations"] += 1
        if len(ids) > self.longest:
            shortened = self._shortened(conversation)
            self.counts["dropped" if shortened is None else "shortened"] += 1
            if shortened is None:
                return np.zeros(0, dtype=token_dtype(self.vocab_size))
            ids, scored = shortened
        return (2 * ids + scored).astype(token_dtype(self.vocab_size))

    def encoded(
        self, conversation: Conversation, messages: Sequence[Message]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Ids of the first messages of a conversation, and which are scored."""
        return encode(self.chat.render(messages, conversation.tools), self.tokenizer)

    def _shortened(self, conversation: Conversation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None:
        messages = conversation.messages
        for n in reversed(range(1, len(messages))):
            if answered(messages[n - 1]):
                ids, scored = self.encoded(conversation, messages[:n])
                if len(ids) <= self.longest:
                    return ids, scored
        return None

    def decode(self, ids: npt.ArrayLike) -> str:
        return self.tokenizer.decode(np.asarray(ids) // 2)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return self.tokenizer.token_bytes()

    def to_json(self) -> dict[str, Any]:
        return {**self.tokenizer.to_json(), "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Rendering:
        raise NotImplementedError("the tokenizer is rebuilt, and rendered with again")

    def fingerprint(self) -> str:
        return digest(*self._shaping(), state(self, LEFT_OUT))

    def _shaping(self) -> list[Any]:
        """The parts of a fingerprint that all renderings have. With the kind: of the same files, the tokens of prompts
        and of whole conversations are others."""
        words = self.tokenizer
        special = [words.bos, words.eos, sorted(words.special_words.items())]
        return [self.kind, words.fingerprint(), special, self.chat.identity()]

    def _contents(self, conversations: Iterable[Conversation]) -> Iterable[str]:
        """All texts of conversations, with those of the format."""
        for each in conversations:
            yield from (piece.text for piece in self.chat.render(each.messages, each.tools) if not piece.special)


def refuse_unscored(conversation: Conversation, is_scored: bool) -> None:
    """Refuse a conversation without a scored token, by its file and line."""
    if not is_scored:
        rule = "the conversation has no scored token, so nothing would be learned from it"
        remedy = "Add an answer (role assistant), or remove the record"
        raise ConfigError("data.corpus.files", conversation.where, rule, remedy)


def best_fit(lengths: Ints, capacity: int, loads: Ints | None = None, most: int = 0) -> list[list[int]]:
    """Pack items into rows, longest first, each into the fullest row that it fits (best-fit decreasing).

    Args:
        lengths: of the items, at most ``capacity``
        capacity: of a row
        loads: of the items, of a second budget, at most ``most``; None for one budget
        most: the load of a row

    Returns:
        the items of each row; rows in the order of their first item
    """
    rows: list[list[int]] = []
    spare: list[list[tuple[int, int]]] = [[] for _ in range(most + 1)]  # by load left: (room left, row), ascending
    for item in np.argsort(-lengths, kind="stable").tolist():
        length, load = int(lengths[item]), 0 if loads is None else int(loads[item])
        places = ((left, bisect.bisect_left(spare[left], (length, -1))) for left in range(load, most + 1))
        fitting = [(*spare[left][at], left, at) for left, at in places if at < len(spare[left])]
        if fitting:
            free, row, left, at = min(fitting)
            del spare[left][at]
            rows[row].append(item)
        else:
            rows.append([item])
            free, row, left = capacity, len(rows) - 1, most
        bisect.insort(spare[left - load], (free - length, row))
    return rows


@dataclass(frozen=True)
class RowOrder:
    """The order of training rows: a shuffle of each epoch, a pure function of (seed, epoch).

    Args:
        n_windows: rows
        batch_size: rows of a global batch
        seed: of the order, ≥ 0
    """

    n_windows: int
    batch_size: int
    seed: int

    @property
    def n_batches(self) -> int:
        """Global batches of an epoch; the last incomplete one is dropped."""
        return self.n_windows // self.batch_size

    def epoch(self, epoch: int) -> Ints:
        """The rows of an epoch's global batches [n_batches, batch_size]."""
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        rows = random.permutation(self.n_windows)[: self.n_batches * self.batch_size]
        return rows.astype(np.int64).reshape(self.n_batches, self.batch_size)

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Ints]]:
        """As ``Order.batches``; all rows are one long."""
        return ((1, rows) for rows in over_epochs(self.epoch, self.n_batches, first, last))


class Rows(Dataset[dict[str, Tensor]]):
    """Batches of packed conversations.

    Args:
        stream: the annotated tokens, a document each
        sequence_length: T
        token_bytes: UTF-8 bytes of each id [V]
    """

    def __init__(self, stream: Stream, sequence_length: int, token_bytes: Ints) -> None:
        self.stream, self.sequence_length, self.token_bytes = stream, sequence_length, token_bytes
        ends = np.append(stream.starts[1:], stream.n_tokens).astype(np.int64)
        self.starts: Ints = np.asarray(stream.starts)
        self.lengths: Ints = ends - stream.starts - 1  # without the separator of the cache
        self.rows = self._arrange()

    def _arrange(self) -> list[list[int]]:
        """The items of each row."""
        return best_fit(self.lengths, self.sequence_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """The batch of these rows, −1 for an empty one: tokens, targets, segments, positions [B,T], n_bytes [B]."""
        filled = [self._row([] if row == PADDING else self.rows[row], self.sequence_length) for row in rows]
        return {name: torch.from_numpy(np.stack([each[name] for each in filled])) for name in filled[0]}

    __getitem__ = __getitems__  # called by a loader whose items are lists, without a batch sampler

    def _row(self, items: list[int], T: int) -> dict[str, Ints]:
        tokens = np.full(T, self.stream.eos // 2, dtype=np.int64)
        targets = np.full(T, IGNORED, dtype=np.int64)
        segments, positions, at = np.full(T, NO_DOCUMENT, dtype=np.int64), np.arange(T), 0
        for number, item in enumerate(items):
            first, length = int(self.starts[item]), int(self.lengths[item])
            marked = self.stream.tokens[first : first + length].astype(np.int64)
            here = slice(at, at + length)
            tokens[here], segments[here], positions[here] = marked // 2, number, np.arange(length)
            targets[at : at + length - 1] = np.where(marked[1:] % 2 == 1, marked[1:] // 2, IGNORED)
            at += length
        positions[at:] = np.arange(T - at)
        n_bytes = np.where(targets >= 0, self.token_bytes[targets.clip(min=0)], 0).sum()
        return {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions, "n_bytes": n_bytes}

    def share_scored(self) -> float:
        """The share of tokens that are scored."""
        marked = self.stream.tokens
        return float((marked % 2).sum() / max(int(self.lengths.sum()), 1))
