"""A request of a running batch and its answer, and which decoders compute rows that join and leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.layer import LayerCache, caches_that_fit
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.input import Media
from blockwright.blocks.layer import Layer
from blockwright.registry import BlockError


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


def refuse_dependent_rows(decoder: Decoder) -> None:
    """Refuse a decoder in which a row changes what another gets.

    Raises:
        BlockError
    """
    for name, block in decoder.named_modules():
        if isinstance(block, Block) and not block.independent:
            rule = "what a row gets depends on the other rows, so requests that come and go would change each other"
            raise BlockError(name, type(block).__name__, rule, "Choose another block, or generate rows one by one")


def joinable_caches(decoder: Decoder, rows: int, room: int, bits: int | None, ahead: int = 0) -> list[Cache]:
    """``Decoder.new_caches`` of rows that may join and leave.

    Args:
        ahead: further room, for tokens that are never kept

    Raises:
        BlockError: an attention keeps no cache, or one of a class that is no ``Cache``, or the caches take more memory
            than there is
    """
    layers = [(f"layers.{i}", decoder.layers[i]) for i in decoder.order()]
    return _of_layers(layers, decoder, rows, room, bits, ahead)


def joinable_caches_of_depths(
    decoder: Decoder, depths: int, rows: int, room: int, bits: int | None, ahead: int = 0
) -> list[Cache]:
    """As ``joinable_caches``, of the first depths of multi-token prediction."""
    layers = [(f"mtp.{k}.layer", decoder.get_submodule(f"mtp.{k}.layer")) for k in range(depths)]
    return _of_layers(layers, decoder, rows, room, bits, ahead)


def _of_layers(
    layers: Sequence[tuple[str, nn.Module]], decoder: Decoder, rows: int, room: int, bits: int | None, ahead: int
) -> list[Cache]:
    like = decoder.embedding.weight

    def make(device: torch.device) -> list[Cache]:
        return [_joinable(name, layer, (rows, room + ahead, like.dtype, device, bits)) for name, layer in layers]

    caches = caches_that_fit(make, rows, room + ahead, like.device)
    for cache in caches if ahead else ():
        cache.declared = room
    return caches


def _joinable(name: str, layer: nn.Module, made: tuple[int, int, torch.dtype, torch.device, int | None]) -> Cache:
    place = f"{name}.attention"
    assert isinstance(layer, Layer)
    try:
        cache = layer.new_cache(*made)
    except NotImplementedError:
        rule = "an attention of this model keeps no cache, which rows could join"
        raise BlockError(place, None, rule, "Choose another attention, or give it new_cache") from None
    held = cache.first if isinstance(cache, LayerCache) else cache
    if not isinstance(held, Cache):
        rule = f"{type(layer.attention).__name__} keeps a {type(held).__name__}, which rows cannot join"
        remedy = "Derive it from blockwright.blocks.cache.base.Cache, or generate rows one by one"
        raise BlockError(place, type(held).__name__, rule, remedy)
    return cache
