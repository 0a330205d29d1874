"""Conversations as text for programs that know only text: special tokens stand between marks that users cannot write.

lm-evaluation-harness joins rendered conversations, prefixes and answers as strings, and has them encoded later. A
special token that were its mere word there could not be distinguished from the same word in a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockwright import registry
from blockwright.blocks.checkpoint.source import read_start
from blockwright.registry import Node, Scope
from blockwright.training.data.chat.base import Chat, Piece, encode
from blockwright.training.data.tokenizers.base import Tokenizer

MARK = "\ue003"  # a private-use character, removed from texts


class ChatText:
    """A chat format with a model's tokenizer.

    Args:
        name: a registered format: ``chatml``, ``jinja``, …; or a node with its settings
        words: the tokenizer

    Raises:
        ConfigError: there is no such format, or the tokenizer lacks its special tokens
    """

    def __init__(self, name: str | dict[str, Any], words: Tokenizer) -> None:
        self.chat: Chat = registry.build("chat", Node(name, "model_args.chat"), Scope({}, {}))
        self.chat.prepare(words)
        self.words = words

    def render(self, messages: Sequence[dict[str, Any]], opened: bool = True) -> str:
        """Text of a conversation whose next turn is the model's; not ``opened``: whose last message it continues."""
        pieces = self.chat.open(messages if opened else messages[:-1])
        pieces = pieces if opened else [*pieces, Piece(messages[-1]["content"])]
        parts = [f"{MARK}{p.text}{MARK}" if p.special else p.text.replace(MARK, "") for p in pieces]
        return "".join([*parts, MARK * 2 if opened else ""])  # what follows is encoded apart, as in training

    def encode(self, text: str) -> list[int]:
        """Ids of a text that ``render`` began; one without marks is ordinary text."""
        pieces = [Piece(part, special=i % 2 == 1) for i, part in enumerate(text.split(MARK))]
        apart = [piece if piece.text or not piece.special else Piece("", scored=True) for piece in pieces]
        return encode(apart, self.words)[0].tolist()


def format_of(start: Path) -> str | dict[str, Any] | None:
    """The format of the conversations that a run was trained on; None for other models."""
    data = (read_start(start).get("configuration") or {}).get("data") or {}
    return data.get("chat") if isinstance(data, dict) else None
