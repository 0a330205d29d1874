from __future__ import annotations

from blockwright.registry import register
from blockwright.training.data.chat.base import EOS, Chat, Message, Piece, answered


@register("chat", "plain")
class Plain(Chat):
    """The texts of the turns, one after the other, and the end of the document after each answer.

    For prompts and completions, and for tokenizers without special tokens. Nothing marks roles or separates turns:
    write what separates them in the texts.
    """

    def __init__(self) -> None: ...

    def turn(self, message: Message) -> list[Piece]:
        text = Piece(message["content"], scored=answered(message))
        return [text, Piece(EOS, True, answered(message))] if message["role"] == "assistant" else [text]

    def header(self) -> list[Piece]:
        return []
