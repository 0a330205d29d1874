"""Chat formats: the text around the turns of a conversation, which of it is scored; those of released models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry import Composable, ConfigError, family, register
from blockwright.training.data.fingerprint import digest, state
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

BOS, EOS = "bos", "eos"  # the tokenizer's own special tokens, whatever their words

# role, content; scored: false excludes an answer from the loss; tool_calls; reasoning_content
Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # JSON schemas


class UnavailableError(ConfigError):
    """Nothing can be rendered now, through no fault of the format or of the conversation."""


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation.

    Args:
        text: ordinary text, in which no special token is ever recognised; or the word of a special token
        special: whether it is a special token: ``bos``, ``eos``, or a word of the tokenizer
        scored: whether the loss counts its tokens
    """

    text: str
    special: bool = False
    scored: bool = False


@family("chat", root="data")
class Chat(Composable):
    """A chat format.

    ``open(messages)`` followed by an answer's scored pieces is what ``render`` gives with the answer. Pieces are
    encoded separately and their ids joined: the boundary of what is scored never lies within a token, and text of users
    is never a special token.

    Class attributes:
        version: to be raised when the code writes another text
        left_out: attribute → why the rendered text does not depend on it
    """

    version: ClassVar[int] = 1
    left_out: ClassVar[Mapping[str, str]] = {}

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that lacks a special token of the format.

        Raises:
            ConfigError: at ``data.chat``
        """
        for word in self.words():
            encode_special(word, tokenizer)

    def check_scores(self) -> None:  # by default answers are scored
        """Refuse a format that would score no token; called before training alone.

        Raises:
            ConfigError: at ``data.chat``
        """

    def words(self) -> Iterable[str]:
        """The special tokens of the format."""
        return ()

    def begin(self) -> list[Piece]:
        """What precedes the first turn."""
        return []

    @abstractmethod
    def turn(self, message: Message) -> list[Piece]:
        """A turn; the content of an answer, and what ends it, are scored where ``answered``.

        Args:
            message: with ``role`` ``system``, ``user`` or ``assistant``, and ``content``
        """

    @abstractmethod
    def header(self) -> list[Piece]:
        """What a model continues with an answer: the beginning of an assistant's turn, up to what is scored."""

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Piece]:
        """The pieces of a conversation.

        Args:
            messages: the turns
            tools: that the model may call

        Raises:
            ConfigError: at ``data.chat``: tools or reasoning, and the format has no form for them
        """
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            rule = "the format has no form for tools, which a conversation has"
            remedy = (
                "Use data/chat=jinja with a template that shows them, or remove tools, tool_calls and tool messages"
            )
            raise ConfigError("data.chat", type(self).__name__, rule, remedy)
        if any(message.get("reasoning_content") for message in messages):
            rule = "the format has no form for reasoning_content, which a conversation has"
            remedy = "Use data/chat=jinja with a template that shows it, write it into content, or remove it"
            raise ConfigError("data.chat", type(self).__name__, rule, remedy)
        return [*self.begin(), *(piece for message in messages for piece in self.turn(message))]

    def open(self, messages: Sequence[Message], tools: Tools = ()) -> list[Piece]:
        """The pieces of a conversation whose next turn is the model's."""
        return [*self.render(messages, tools), *self.header()]

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids that end an answer."""
        return tokenizer.ends

    def template(self) -> str | None:
        """The Jinja template to export a model with that was trained in this format; None for its tokenizer's own."""
        return None

    def node(self) -> dict[str, Any]:
        """The node that builds this format again, as plain types."""
        registered: Any = type(self)
        return {"name": registered.Config.name, **self.settings()}

    def settings(self) -> dict[str, Any]:
        """The arguments of its constructor, as plain types; no file, whose text is ``template`` and so beside the
        tokenizer of a checkpoint."""
        return {}

    def identity(self) -> str:
        """What the rendered text depends on, all settings: names the cache of rendered conversations."""
        return digest(state(self, self.left_out), self.version, self.made())

    def made(self) -> list[Any]:
        """Plain data that ``prepare`` made of files and of the tokenizer, and that the rendered text depends on."""
        return []


def answered(message: Message) -> bool:
    """Whether the loss counts a turn."""
    return message["role"] == "assistant" and message.get("scored", True) is not False


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Ids of pieces and whether each is scored. Adjacent texts are encoded as one, unless only one is scored."""
    ids: list[int] = []
    scored: list[bool] = []
    for (special, is_scored), group in groupby(pieces, key=lambda piece: (piece.special, piece.scored)):
        words = [piece.text for piece in group]
        if special:
            new = [encode_special(word, tokenizer) for word in words]
        else:
            new = tokenizer.encode("".join(words)).tolist() if any(words) else []
        ids += [i for i in new if i is not None]
        scored += [is_scored] * (len(ids) - len(scored))
    return np.array(ids, dtype=np.int64), np.array(scored, dtype=np.bool_)


def encode_special(word: str, tokenizer: Tokenizer) -> int | None:
    """The id of a special token; None for ``bos`` where the tokenizer has none.

    Raises:
        ConfigError: at ``data.chat``, for a word that is not a special token of the tokenizer
    """
    if word in (BOS, EOS):
        return tokenizer.bos if word == BOS else tokenizer.eos
    if word not in tokenizer.special_words:
        rule = f"the {tokenizer.kind} tokenizer has no special token {word}"
        raise ConfigError("data.chat", word, rule, "Use data/chat=plain, or the tokenizer of a model with this format")
    return tokenizer.special_words[word]


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
