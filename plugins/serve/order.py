"""What a request orders, whichever of the two protocols it is written in."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le

from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.input import Media
from blockwright.plugins.serve.fields import Fields
from blockwright.plugins.serve.refusal import RefusedError, refused
from blockwright.plugins.serve.served import Served
from blockwright.registry import BlockError

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
