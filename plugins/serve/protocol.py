"""The contract of a protocol: how a request is read, and how the texts of its answer are written."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from blockwright.blocks.generation.generate import BROKEN, TextStream
from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.input import Media
from blockwright.plugins.serve.body import Fields, RefusedError, refused
from blockwright.plugins.serve.served import Served
from blockwright.registry import BlockError

# --- one text of an answer, as its tokens come ------------------------------------------------------------------------


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


# --- what a request orders, whichever of the two protocols it is written in -------------------------------------------


MOST_STOPS, LONGEST_STOP = 4, 200  # of OpenAI; characters, since all of its beginnings are compared with each token
Copies = Annotated[int, Ge(1), Le(128)]
Seed = Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]


@dataclass(frozen=True)
class Order:
    """Texts to make.

    Args:
        jobs: of each prompt as many as there are copies, after each other
        prompts: how many
        stops: strings that end a text
        likeliest: how many of the likeliest tokens to report with each token; None for no likelihoods
        stream: whether pieces are sent as they come
        usage: whether a stream ends with the number of its tokens
    """

    jobs: list[Job]
    prompts: int
    stops: tuple[str, ...]
    likeliest: int | None
    stream: bool
    usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(len(job.prompt) for job in self.jobs[:: len(self.jobs) // self.prompts])


def read_order(
    fields: Fields,
    served: Served,
    prompts: Sequence[list[int]],
    new_tokens: int | None,
    likeliest: int | None,
    chat: bool,
    media: Media | None = None,
) -> Order:
    """Read what both protocols share, and refuse the fields that are left.

    Args:
        fields: of the request
        served: the model
        prompts: ids
        new_tokens: at most; None for as many as there is room for
        likeliest: as of ``Order``
        chat: whether the texts are answers in a conversation
        media: what the prompts hold beside text

    Raises:
        RefusedError
    """
    stops = _stops(fields)
    ends = served.ends(stops, chat, ignored=fields.take("ignore_eos", bool, False))
    copies = fields.take("n", Copies, 1)
    served.check_texts(len(prompts) * copies, "n")
    first = fields.take("seed", Seed)
    stream = fields.take("stream", bool, False)
    usage = _usage(fields, stream)
    sampling = _sampling(fields)
    fields.finish()
    jobs = list[Job]()
    for prompt in prompts:
        room = room_for(served, len(prompt), new_tokens)
        for i in range(copies):
            seed = secrets.randbits(62) if first is None else first + i
            jobs.append(Job(prompt, room, sampling, seed, ends, logprobs=likeliest, media=media))
    return Order(jobs, len(prompts), stops, likeliest, stream, usage)


def _stops(fields: Fields) -> tuple[str, ...]:
    fields.check_count("stop", MOST_STOPS)
    value = fields.take("stop", str | list[str], [])
    stops = (value,) if isinstance(value, str) else tuple(value)
    if len(stops) > MOST_STOPS or not all(0 < len(stop) <= LONGEST_STOP for stop in stops):
        rule = f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters end a text"
        raise fields.refuse("stop", value, rule)
    return stops


def _usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", dict)
    if options is None:
        return False
    if not stream:
        raise fields.refuse("stream_options", options, "has no effect without stream = true")
    inner = Fields(options, "stream_options.")
    usage = inner.take("include_usage", bool, False)
    inner.finish({"include_obfuscation": (False,), "continuous_usage_stats": (False,)})
    return usage


def _sampling(fields: Fields) -> Sampling:
    defaults: dict[str, Any] = {"temperature": 1, "top_p": None, "top_k": None, "min_p": None, "repetition_penalty": 1}
    chosen = {name: fields.take(name, int | float, default) for name, default in defaults.items()}
    try:
        return Sampling(**chosen)
    except BlockError as error:
        raise refused(error, error.parameter) from None


def room_for(served: Served, n_prompt: int, new_tokens: int | None) -> int:
    """New tokens after a prompt of so many tokens: those wanted, or None for all that there is room for.

    Raises:
        RefusedError: there is no room for them
    """
    room = served.room - n_prompt
    if room < 1 or (new_tokens or 1) > room:
        total = f"The prompt has {n_prompt} tokens, and {new_tokens or 1} more are wanted"
        rule = f"{total}: this server has room for {served.room} together"
        raise RefusedError(400, rule, "max_tokens" if room >= 1 else "prompt", "context_length_exceeded")
    return new_tokens or room


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
