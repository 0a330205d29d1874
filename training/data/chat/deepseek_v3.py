from __future__ import annotations

from collections.abc import Iterable

from blockwright.registry import register
from blockwright.training.data.chat.base import BOS, EOS, Chat, Message, Piece, answered

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


@register("chat", "deepseek_v3")
class DeepSeekV3(Chat):
    """``BOS system<｜User｜>U<｜Assistant｜>A EOS``, of DeepSeek-V3.

    R1 has the same format; its prompts begin the answer with ``<think>⏎``, and its past answers lose their thoughts.
    Neither is done here.
    """

    def __init__(self) -> None: ...

    def words(self) -> Iterable[str]:
        return (USER, ASSISTANT)

    def begin(self) -> list[Piece]:
        return [Piece(BOS, True)]

    def turn(self, message: Message) -> list[Piece]:
        scored, text = answered(message), message["content"]
        if message["role"] == "assistant":
            return [*self.header(), Piece(text, scored=scored), Piece(EOS, True, scored)]
        return [*([Piece(USER, True)] if message["role"] == "user" else []), Piece(text)]

    def header(self) -> list[Piece]:
        return [Piece(ASSISTANT, True)]
