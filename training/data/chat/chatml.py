from __future__ import annotations

from collections.abc import Iterable

from blockwright.registry import register
from blockwright.training.data.chat.base import Chat, Message, Piece, answered, encode_special
from blockwright.training.data.tokenizers.base import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"


@register("chat", "chatml")
class ChatML(Chat):
    """``<|im_start|>role⏎content<|im_end|>⏎`` for each turn: Qwen, SmolLM and many others.

    Without Qwen2's default system message: write one, if it is wanted.
    """

    def __init__(self) -> None: ...

    def words(self) -> Iterable[str]:
        return (START, END)

    def turn(self, message: Message) -> list[Piece]:
        scored = answered(message)
        content = [Piece(message["content"], scored=scored), Piece(END, True, scored)]
        return [Piece(START, True), Piece(f"{message['role']}\n"), *content, Piece("\n")]

    def header(self) -> list[Piece]:
        return [Piece(START, True), Piece("assistant\n")]

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        end = encode_special(END, tokenizer)
        assert end is not None
        return tokenizer.ends | {end}
