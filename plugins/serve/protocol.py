"""The contract of a protocol: how a request is read, and how the texts of its answer are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from blockwright.plugins.serve.choice import Piece, Token
from blockwright.plugins.serve.fields import Fields
from blockwright.plugins.serve.order import Order
from blockwright.plugins.serve.served import Served

Json = dict[str, Any]


class Protocol(ABC):
    """One of OpenAI's.

    Class attributes:
        path: of its requests
        prefix: of the id of an answer
        kind, chunk_kind: ``object`` of an answer, and of a piece of one that streams
    """

    path: ClassVar[str]
    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    @abstractmethod
    async def read(self, fields: Fields, served: Served) -> Order:
        """What a request orders.

        Raises:
            RefusedError: a field is wrong, or is not supported
        """

    @abstractmethod
    def text(self, text: str) -> Json:
        """A whole text, as part of a choice."""

    @abstractmethod
    def opening(self) -> Sequence[Json]:
        """What a stream sends of a choice before its text, as parts of a choice."""

    @abstractmethod
    def delta(self, text: str) -> Json:
        """A piece of a text, as part of a choice."""

    @abstractmethod
    def likelihoods(self, tokens: Sequence[Token]) -> Json:
        """The field ``logprobs`` of tokens."""

    def choice(self, index: int, part: Mapping[str, Any], piece: Piece, likelihoods: bool) -> Json:
        """A choice of an answer.

        Args:
            index: of the choice
            part: its text
            piece: why it has ended, and the likelihoods of its tokens
            likelihoods: whether these are wanted
        """
        logprobs = self.likelihoods(piece.tokens) if likelihoods else None
        return {"index": index, **part, "logprobs": logprobs, "finish_reason": piece.why}
