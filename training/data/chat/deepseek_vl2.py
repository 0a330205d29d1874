from __future__ import annotations

from collections.abc import Iterable

from registry import register
from training.data.chat.base import BOS, EOS, Chat, Message, Piece, answered

USER, ASSISTANT = "<|User|>", "<|Assistant|>"


@register("chat", "deepseek_vl2")
class DeepSeekVL2(Chat):
    """``BOS system⏎⏎<|User|>: U⏎⏎<|Assistant|>: A EOS``, of DeepSeek-VL2, arXiv 2412.10302.

    From conversation.py of deepseek-ai/DeepSeek-VL2, which writes no system text of its own. The prompt of an answer
    ends with the colon: the space after it belongs to the answer.
    """

    def __init__(self) -> None: ...

    def words(self) -> Iterable[str]:
        return (USER, ASSISTANT)

    def begin(self) -> list[Piece]:
        return [Piece(BOS, True)]

    def turn(self, message: Message) -> list[Piece]:
        scored, text = answered(message), message["content"]
        if message["role"] == "assistant":
            return [*self.header(), Piece(f" {text}", scored=scored), Piece(EOS, True, scored)]
        return [*([Piece(USER, True), Piece(": ")] if message["role"] == "user" else []), Piece(f"{text}\n\n")]

    def header(self) -> list[Piece]:
        return [Piece(ASSISTANT, True), Piece(":")]
