"""A request of a running batch, and its answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.input import Media


class Likelihood(NamedTuple):
    """How likely a token was.

    drawn: log-probability of the token
    likeliest: the likeliest tokens and their log-probabilities, in falling order
    """

    drawn: float
    likeliest: list[tuple[int, float]]


@dataclass(eq=False)
class Job:
    """A request, and its answer so far.

    Args:
        prompt: token ids
        new_tokens: how many to add at most
        sampling: sampling parameters
        seed: of its draws
        stop_tokens: tokens that end it; not part of the answer
        logprobs: number of the likeliest tokens to note at each step, beside the drawn one; None: nothing is noted
        media: what the prompt holds beside text, in order

    Attributes:
        tokens: added so far
        likelihoods: of each of them, by the softmax of the logits as they are, before the sampling changes them
        ended: why it ended, by a stop token, its length, ``Batch.cancel``, or logits that no token can be drawn from;
            None before
    """

    prompt: Sequence[int]
    new_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_tokens: Collection[int] = frozenset()
    logprobs: int | None = None
    media: Media | None = None
    tokens: list[int] = field(default_factory=list, init=False)
    likelihoods: list[Likelihood] = field(default_factory=list, init=False)
    ended: Literal["end", "length", "cancelled", "failed"] | None = field(default=None, init=False)

    def receive(self, token: int) -> list[News]:
        """Add a token that was drawn: the news of it."""
        if token in self.stop_tokens:
            self.ended = "end"
            return [(self, None)]
        self.tokens.append(token)
        if len(self.tokens) < self.new_tokens:
            return [(self, token)]
        self.ended = "length"
        return [(self, token), (self, None)]

    def fail(self) -> list[News]:
        """End it without a token: the news of it."""
        self.ended = "failed"
        return [(self, None)]


News = tuple[Job, int | None]


def note_likelihoods(jobs: Sequence[Job], tokens: Sequence[int], logits: Tensor) -> None:
    """Note how likely the drawn tokens are by logits [B,V], for the jobs that want it."""
    wanted = [i for i, job in enumerate(jobs) if job.logprobs is not None and tokens[i] not in job.stop_tokens]
    if not wanted:
        return
    logp = logits[wanted].log_softmax(-1)
    best = logp.topk(max(jobs[i].logprobs or 0 for i in wanted))
    columns = torch.tensor([[tokens[i]] for i in wanted], device=logp.device, dtype=torch.int64)
    drawn = logp.gather(1, columns)[:, 0].tolist()
    for i, own, ids, values in zip(wanted, drawn, best.indices.tolist(), best.values.tolist(), strict=True):
        jobs[i].likelihoods.append(Likelihood(own, list(zip(ids, values, strict=True))[: jobs[i].logprobs]))
