"""Files beside the text of a prompt, such as sound: how a command line names them, and how a model reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar, Self

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.input import Media
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser

ENTRY_POINTS = "blockwright.attachments"  # name of a point: the kind of input that reads the files


class Attachment(ABC):
    """Files of one kind, each with a mark in the prompts that it stands for.

    A package offers a class for a kind of input by an entry point of the group ``blockwright.attachments``, whose name
    is the kind. ``blockwright generate`` then has its options, and ``blockwright chat`` the command ``/WORD FILE``.

    Class attributes:
        word: for one such file, as people name it
        mark: stands for a file in a text
    """

    word: ClassVar[str]
    mark: ClassVar[str]

    @staticmethod
    @abstractmethod
    def add_options(parser: Parser) -> None:
        """Add the options that name the files."""

    @classmethod
    @abstractmethod
    def of(cls, options: Namespace) -> Self | None:
        """The files of a command line; None without.

        Raises:
            ConfigError: at an option, for a value that cannot be right whatever the model
        """

    @classmethod
    @abstractmethod
    def of_files(cls, files: Sequence[str]) -> Self:
        """Some files, in the order of their marks."""

    @staticmethod
    @abstractmethod
    def refuse_marks(prompts: Sequence[str]) -> None:
        """Refuse prompts with marks, where there are no files: the model would read the marks as text.

        Raises:
            ConfigError: a prompt has marks
        """

    @abstractmethod
    def encode(
        self, decoder: Decoder, prompts: Sequence[str], ids_of: Callable[[str], list[int]]
    ) -> tuple[list[list[int]], Media]:
        """The ids of each prompt, with places for the files, and the content of the files.

        Args:
            decoder: the model
            prompts: texts with marks
            ids_of: encodes a text

        Raises:
            ConfigError: at an option: the model reads no such files, one cannot be read, or marks and files disagree
        """

    def finish(self, text: str) -> None:  # noqa: B027
        """Use the continuation of the first prompt. Does nothing by default."""


@cache
def attachments() -> dict[str, type[Attachment]]:
    """Kind of input → the class of its files."""
    return {point.name: point.load() for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name)}


def readable(decoder: Decoder) -> dict[str, type[Attachment]]:
    """Kind of input of a model → the class of its files."""
    return {kind: each for kind, each in attachments().items() if kind in decoder.inputs}


def attached(options: Namespace) -> Attachment | None:
    """The files of a command line; None without.

    Raises:
        ConfigError: an option cannot be right, or there are files of several kinds
    """
    named = {kind: files for kind, each in attachments().items() if (files := each.of(options)) is not None}
    if len(named) > 1:
        rule = f"have files of several kinds: {', '.join(named)}"
        raise ConfigError("prompts", None, rule, "Name files of one kind")
    return next(iter(named.values()), None)


def refuse_marks(decoder: Decoder, prompts: Sequence[str]) -> None:
    """Refuse prompts with marks of files that the model could read, where there are none.

    Raises:
        ConfigError
    """
    for each in readable(decoder).values():
        each.refuse_marks(prompts)
