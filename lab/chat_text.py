"""Conversations as text for programs that know only text: special tokens stand between marks that users cannot write.

Which format a model speaks: ``own_format``. lm-evaluation-harness joins rendered conversations, prefixes and answers as
strings, and has them encoded later. A special token that were its mere word there could not be distinguished from the
same word in a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from blockwright import registry
from blockwright.blocks.checkpoint.source import read_start
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.data.chat.base import BOS, EOS, Chat, Piece, encode
from blockwright.training.data.chat.jinja import has_template, reread
from blockwright.training.data.tokenizers.base import Tokenizer

READ = "Name the format yourself, or resume the run for a step: its checkpoint then holds the text of its template"
MARK = "\ue003"  # a private-use character, removed from texts
_ASK, _ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
TALKS = ([_ASK], [{"role": "system", "content": "Be brief."}, _ASK], [_ASK, _ANSWER, _ASK])  # to compare formats by


class ChatText:
    """A chat format with a model's tokenizer.

    Args:
        name: a registered format: ``chatml``, ``jinja`` for the template beside the tokenizer, …; or a node with its
            settings
        words: the tokenizer
        path: of the name, for messages

    Attributes:
        ends: tokens that end an answer

    Raises:
        ConfigError: there is no such format, the tokenizer lacks its special tokens, or its template refuses an answer
    """

    def __init__(self, name: str | dict[str, Any], words: Tokenizer, path: str = "model_args.chat") -> None:
        self.words = words
        try:
            self.chat: Chat = registry.build("chat", Node(name, path), Scope({}, {}))
        except ConfigError as error:
            remedy = error.remedy if isinstance(name, str) else READ
            raise ConfigError(error.path.removesuffix(".name"), error.value, error.rule, remedy) from None
        try:
            self.chat.prepare(words)
            self.ends = self.chat.ends(words)
        except ConfigError as error:
            remedy = "Choose another format, or a tokenizer and a template that suit it"
            raise ConfigError(path, self.chat.node()["name"], error.rule, remedy) from None

    def render(self, messages: Sequence[dict[str, Any]], opened: bool = True) -> str:
        """Text of a conversation whose next turn is the model's; not ``opened``: whose last message it continues."""
        pieces = self.chat.open(messages if opened else messages[:-1])
        pieces = pieces if opened else [*pieces, Piece(messages[-1]["content"])]
        parts = [f"{MARK}{p.text}{MARK}" if p.special else p.text.replace(MARK, "") for p in pieces]
        return "".join([*parts, MARK * 2 if opened else ""])  # what follows is encoded apart, as in training

    def spelt(self, messages: Sequence[dict[str, Any]]) -> str:
        """``render`` for people, and for comparison: special tokens as their words."""
        words = {number: word for word, number in self.words.special_words.items()}
        names = {BOS: words.get(self.words.bos, ""), EOS: words.get(self.words.eos, "")}  # type: ignore[arg-type]
        return "".join(names.get(p.text, p.text) if p.special else p.text for p in self.chat.open(messages))

    def encode(self, text: str) -> list[int]:
        """Ids of a text that ``render`` began; one without marks is ordinary text."""
        pieces = [Piece(part, special=i % 2 == 1) for i, part in enumerate(text.split(MARK))]
        apart = [piece if piece.text or not piece.special else Piece("", scored=True) for piece in pieces]
        return encode(apart, self.words)[0].tolist()


def own_format(model: Path, words: Tokenizer) -> str | dict[str, Any] | None:
    """The format that a model speaks: that of the conversations it was trained on, else the template beside its
    tokenizer; None for a model without either.

    Args:
        model: a run's folder, a checkpoint or an imported folder
        words: its tokenizer
    """
    return format_of(model, words) or ("jinja" if has_template(words) else None)


def format_of(start: Path, words: Tokenizer) -> str | dict[str, Any] | None:
    """The format of the conversations that a run was trained on; None for other models. Arguments as ``own_format``."""
    try:
        data = (read_start(start).get("configuration") or {}).get("data") or {}
    except ConfigError:  # a model of another program, which has no such record
        return None
    return reread(data.get("chat"), words) if isinstance(data, dict) else None


def difference(trained: ChatText, words: Tokenizer) -> str | None:
    """Where the published template writes another text than the format of a training; None if nowhere.

    What a model is exported with is the template beside its tokenizer, which other programs then use.
    """
    try:
        published = ChatText("jinja", words)
        for talk in TALKS:
            ours, theirs = (form.spelt(talk) for form in (trained, published))
            if ours != theirs:
                n = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if len({*pair}) > 1)
                return f"after {ours[max(n - 20, 0) : n]!r} it writes {theirs[n : n + 40]!r}, not {ours[n : n + 40]!r}"
    except ConfigError as error:
        return f"it cannot be read: {error.rule}"
    return None
