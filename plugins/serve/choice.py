"""One text of an answer, as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.text_stream import BROKEN, TextStream

UNNAMED = "token_id:"  # as vLLM writes it


@dataclass(frozen=True)
class Token:
    """A token with its likelihood.

    Args:
        text: of it alone; ``token_id:ID`` of one that is no whole characters
        logprob: natural logarithm of its probability
        likeliest: text and logprob of the likeliest tokens at its place, in order
        offset: characters of the text before it
    """

    text: str
    logprob: float
    likeliest: list[tuple[str, float]]
    offset: int


@dataclass
class Piece:
    """What is new of a text.

    Args:
        text: may be empty, while a character or what may be a stop string is incomplete
        tokens: with likelihoods, if these are wanted
        why: the text has ended: ``stop`` or ``length``; None before
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    why: str | None = None


class Choice:
    """A text.

    Args:
        job: that makes it
        decode: of the tokenizer
        stops: strings that end it
        likelihoods: whether they are wanted

    Attributes:
        count: tokens read, those of a stop string included
        why: it has ended, see ``Piece``
    """

    def __init__(
        self, job: Job, decode: Callable[[Sequence[int]], str], stops: Sequence[str], likelihoods: bool
    ) -> None:
        self.job, self.count = job, 0
        self.why: str | None = None
        self._decode, self._text = decode, TextStream(decode, stops)
        self._whole = TextStream(decode) if likelihoods else None  # stop strings included: places of tokens
        self._offset = 0
        self._new = Piece()

    def hear(self, token: int | None, why: str | None) -> None:
        """Take a token, or the end of the job."""
        if self.why is not None:
            return  # what came after a stop string
        if token is not None:
            self.count += 1
            self._new.text += self._text.push(token)
            self._keep_likelihood(token)
        if why is not None:
            self._new.text += self._text.close()
        if self._text.ended or why is not None:
            self.why = self._new.why = "length" if why == "length" and not self._text.ended else "stop"

    def take(self) -> Piece | None:
        """What is new since the last call; None if nothing is."""
        new, self._new = self._new, Piece()
        return new if new.text or new.tokens or new.why else None

    def _keep_likelihood(self, token: int) -> None:
        if self._whole is None:
            return
        likelihood = self.job.likelihoods[self.count - 1]
        likeliest = [(self._name(i), logprob) for i, logprob in likelihood.likeliest]
        name, offset, new = self._name(token), self._offset, self._whole.push(token)
        self._offset += len(new)
        if new.endswith(name):  # after characters that have stayed incomplete
            offset = self._offset - len(name)
        self._new.tokens.append(Token(name, likelihood.drawn, likeliest, offset))

    def _name(self, token: int) -> str:
        text = self._decode([token])
        return text if text and BROKEN not in text else f"{UNNAMED}{token}"
