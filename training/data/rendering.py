"""Conversations as documents of annotated tokens: 2·id, plus 1 where the token is scored.

So everything that holds for tokenised text holds for conversations: the cache on disk, its locks, its atomic renaming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import ConfigError
from blockwright.training.data.chat.formats import Chat, Message, answered, encode
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.fingerprint import digest, state
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
