"""The model that is served: its decoder, tokenizer and chat format."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockwright.blocks.input import Media
from blockwright.lab.attachment import refuse_marks
from blockwright.lab.chat.conversation import ChatText, own_format
from blockwright.lab.writer import Writer
from blockwright.plugins.serve.body import RefusedError, refused, shown
from blockwright.plugins.serve.files import MOST_BYTES, Files
from blockwright.registry import ConfigError
from blockwright.training.data.chat.formats import UnavailableError


@dataclass(frozen=True)
class Served:
    """A model under a name.

    Args:
        name: by which requests name it
        writer: the model and its tokenizer
        room: tokens of a prompt and its continuation at most
        texts: that a request may order at most
        chat: the format of conversations; None for a model without one
        bos: whether to begin prompts with the token that begins a document; conversations begin as their format says
        created: when it was loaded, in seconds since 1970
        renderer: renders conversations one by one: those that wait for a slow template take no thread
    """

    name: str
    writer: Writer
    room: int
    texts: int
    chat: ChatText | None = None
    bos: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    renderer: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "rendering"))

    @property
    def file_bytes(self) -> int:
        """What the files of a request take at most, in base64; 0 for a model that reads text alone."""
        return 0 if Files.of(self.writer.decoder).kind is None else MOST_BYTES // 3 * 4 + 4096

    def encode(self, text: str, param: str) -> list[int]:
        """The ids of a prompt.

        Raises:
            RefusedError: there are none, the text is no Unicode, or it has marks of files, which requests cannot bring
        """
        self.refuse_marks([text], param)
        try:
            return self.writer.encode(text, self.bos)
        except ConfigError as error:
            raise RefusedError(400, f"{param} {error.rule}", param, "invalid_value") from None

    def check_ids(self, ids: Sequence[int], param: str) -> list[int]:
        """The ids of a prompt that a request gives as such.

        Raises:
            RefusedError: one is not of the vocabulary
        """
        known = self.writer.decoder.config["vocab_size"]
        for i in ids:
            if not 0 <= i < known:
                rule = f"{param} = {shown(i)}: ids are from 0 to {known - 1}"
                raise RefusedError(400, rule, param, "invalid_value")
        return list(ids)

    def check_texts(self, n: int, param: str) -> None:
        """Refuse a number of texts that can never run or wait at once, before any memory is taken for them.

        Raises:
            RefusedError: at ``param``
        """
        if n > self.texts:
            rule = f"The request asks for {n} texts, and {self.texts} can run or wait at once"
            raise RefusedError(400, rule, param, "too_many_texts")

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation whose next turn is the model's, for ``encode_chat``.

        Raises:
            RefusedError: the model has no chat format, or it refuses the conversation; with 503, so that clients try
                again, where what renders does not run
        """
        if self.chat is None:
            rule = "This model has no chat format. Use /v1/completions, or start the server with --chat FORMAT"
            raise RefusedError(400, rule, "messages", "no_chat_format")
        try:
            return self.chat.render([dict(message) for message in messages])
        except ConfigError as error:
            if isinstance(error, UnavailableError):
                raise RefusedError(503, f"{error.rule}. Try again later", code="not_ready") from None
            raise refused(error, "messages") from None

    def refuse_marks(self, texts: Sequence[str], param: str) -> None:
        """Refuse texts with marks of files: a file is a part of a message, and its mark is written for it.

        Raises:
            RefusedError: at ``param``
        """
        try:
            refuse_marks(self.writer.decoder, texts)
        except ConfigError:
            rule = f"{param} has the mark of a file, such as a picture. Send files as parts of messages of a chat"
            raise RefusedError(400, rule, param, "invalid_value") from None

    def encode_chat(self, text: str, files: Files) -> tuple[list[int], Media]:
        """The ids of a conversation that ``render`` wrote, and what its files hold.

        Raises:
            RefusedError: it is empty or no Unicode, a file cannot be read, or the tokenizer is not the model's
        """
        assert self.chat is not None
        try:
            if files.contents:
                ids, media = files.encode(self.writer.decoder, text, self.chat)
            else:
                ids, media = self.chat.encode(text), {}
            self.check_ids(ids, "messages")
        except UnicodeEncodeError:
            raise RefusedError(400, "messages are no Unicode", "messages", "invalid_value") from None
        if not ids:
            rule = "messages are empty, but a model continues at least one token"
            raise RefusedError(400, rule, "messages", "invalid_value")
        return ids, media

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, as far as it is text."""
        return self.writer.words.decode(list(ids))

    def ends(self, stops: Sequence[str], chat: bool, ignored: bool = False) -> frozenset[int]:
        """Tokens that end a text, or an answer, unless these are ``ignored``; special tokens among the stop strings."""
        words = self.writer.words
        of_stops = frozenset(words.special_words[stop] for stop in stops if stop in words.special_words)
        if ignored:
            return of_stops
        return of_stops | words.ends | (self.chat.ends if chat and self.chat is not None else frozenset())


def chat_of(model: str, writer: Writer, name: str | None) -> ChatText | None:
    """The chat format of a model.

    Args:
        model: a run's folder, a checkpoint or an imported folder
        writer: its tokenizer is the format's
        name: of a registered format; None for the one that the model was trained with, or the template beside its
            tokenizer

    Raises:
        ConfigError: there is no such format, or the tokenizer lacks its special tokens
    """
    chosen = name or own_format(Path(model), writer.words)
    if chosen is None:
        return None
    return ChatText(chosen, writer.words, "--chat")
