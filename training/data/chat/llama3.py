from __future__ import annotations

from collections.abc import Iterable

from blockwright.registry import register
from blockwright.training.data.chat.base import Chat, Message, Piece, answered, encode_special
from blockwright.training.data.tokenizers.base import Tokenizer

BEGIN, HEAD, TAIL, END = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


@register("chat", "llama3")
class Llama3(Chat):
    """``<|start_header_id|>role<|end_header_id|>⏎⏎content<|eot_id|>`` for each turn, of Llama 3.

    Contents are stripped of blanks at both ends, as in the published template. Llama 3.1's system message with dates
    is not added.
    """

    def __init__(self) -> None: ...

    def words(self) -> Iterable[str]:
        return (BEGIN, HEAD, TAIL, END)

    def begin(self) -> list[Piece]:
        return [Piece(BEGIN, True)]

    def turn(self, message: Message) -> list[Piece]:
        scored = answered(message)
        content = [Piece(message["content"].strip(), scored=scored), Piece(END, True, scored)]
        return [*self._head(message["role"]), *content]

    def header(self) -> list[Piece]:
        return self._head("assistant")

    def _head(self, role: str) -> list[Piece]:
        return [Piece(HEAD, True), Piece(role), Piece(TAIL, True), Piece("\n\n")]

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        end = encode_special(END, tokenizer)
        assert end is not None
        return tokenizer.ends | {end}
