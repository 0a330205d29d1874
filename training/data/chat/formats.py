"""Formats of conversations that released models know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from blockwright.registry import register
from blockwright.training.data.chat.base import BOS, EOS, Chat, Message, Piece, answered, encode_special
from blockwright.training.data.tokenizers.base import Tokenizer


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


IM_START, IM_END = "<|im_start|>", "<|im_end|>"


@register("chat", "chatml")
class ChatML(Chat):
    """``<|im_start|>role⏎content<|im_end|>⏎`` for each turn: Qwen, SmolLM and many others.

    Without Qwen2's default system message: write one, if it is wanted.
    """

    def __init__(self) -> None: ...

    def words(self) -> Iterable[str]:
        return (IM_START, IM_END)

    def turn(self, message: Message) -> list[Piece]:
        scored = answered(message)
        content = [Piece(message["content"], scored=scored), Piece(IM_END, True, scored)]
        return [Piece(IM_START, True), Piece(f"{message['role']}\n"), *content, Piece("\n")]

    def header(self) -> list[Piece]:
        return [Piece(IM_START, True), Piece("assistant\n")]

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        end = encode_special(IM_END, tokenizer)
        assert end is not None
        return tokenizer.ends | {end}


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


VL2_USER, VL2_ASSISTANT = "<|User|>", "<|Assistant|>"


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
        return (VL2_USER, VL2_ASSISTANT)

    def begin(self) -> list[Piece]:
        return [Piece(BOS, True)]

    def turn(self, message: Message) -> list[Piece]:
        scored, text = answered(message), message["content"].strip()
        if message["role"] == "assistant":
            return [*self.header(), Piece(text, scored=scored), Piece(EOS, True, scored)]
        return [Piece(VL2_USER, True), Piece(f": {text}\n\n")] if message["role"] == "user" else [Piece(text)]

    def header(self) -> list[Piece]:
        return [Piece(VL2_ASSISTANT, True), Piece(":")]
