from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from blockwright.registry import register
from blockwright.training.data.chat.base import BOS, EOS, Chat, Message, Piece, answered

USER, ASSISTANT = "<|User|>", "<|Assistant|>"


@register("chat", "deepseek_vl2")
class DeepSeekVL2(Chat):
    """``BOS system <|User|>: U⏎⏎<|Assistant|>:A EOS``, without spaces around, of DeepSeek-VL2, arXiv 2412.10302.

    What the released processor (``format_messages_v2``) makes ids of: texts are stripped, a system text stands before
    the first turn with nothing between, and nothing stands between the last colon and the answer. The text that it
    prints (``sft_format``) has two newlines after a system text and a space before an answer. It writes no system text
    of its own.
    """

    version: ClassVar[int] = 2  # of the rule above; before, answers began with a space

    def __init__(self) -> None: ...

    def words(self) -> Iterable[str]:
        return (USER, ASSISTANT)

    def begin(self) -> list[Piece]:
        return [Piece(BOS, True)]

    def turn(self, message: Message) -> list[Piece]:
        scored, text = answered(message), message["content"].strip()
        if message["role"] == "assistant":
            return [*self.header(), Piece(text, scored=scored), Piece(EOS, True, scored)]
        return [Piece(USER, True), Piece(f": {text}\n\n")] if message["role"] == "user" else [Piece(text)]

    def header(self) -> list[Piece]:
        return [Piece(ASSISTANT, True), Piece(":")]
