from __future__ import annotations

from blockwright.registry import register
from blockwright.training.data.chat.base import BOS, EOS, Chat, Message, Piece, answered


@register("chat", "deepseek_v2")
class DeepSeekV2(Chat):
    """``BOS system⏎⏎User: U⏎⏎Assistant: A EOS``, of DeepSeek-V2 and V2.5.

    From the README of deepseek-ai/DeepSeek-V2-Chat. The prompt of an answer ends with the colon: the space after it
    belongs to the answer.
    """

    def __init__(self) -> None: ...

    def begin(self) -> list[Piece]:
        return [Piece(BOS, True)]

    def turn(self, message: Message) -> list[Piece]:
        scored, text = answered(message), message["content"]
        if message["role"] == "assistant":
            return [*self.header(), Piece(f" {text}", scored=scored), Piece(EOS, True, scored)]
        return [Piece(f"User: {text}\n\n" if message["role"] == "user" else f"{text}\n\n")]

    def header(self) -> list[Piece]:
        return [Piece("Assistant:")]
