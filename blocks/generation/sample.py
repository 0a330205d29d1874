"""How a token is drawn from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockwright.registry import BlockError


@dataclass(frozen=True)
class Sampling:
    """Transformations of the logits before sampling from their softmax, in this order.

    Names, meanings and order are those of transformers.

    Args:
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur in the row (Keskar et
            al. 2019, arXiv 1909.05858); 1 changes nothing
        temperature: divides the logits; 0 takes the likeliest token, ignoring the following
        top_k: keep the k likeliest tokens; None keeps all
        top_p: keep the smallest set of tokens whose probability sums to at least this (Holtzman et al. 2020, arXiv
            1904.09751); None keeps all
        min_p: keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082);
            None keeps all

    Raises:
        BlockError: a field is out of its range
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    @property
    def narrows(self) -> bool:
        """Whether any token may be excluded."""
        return self.temperature > 0 and (self.top_k, self.top_p, self.min_p) != (None, None, None)

    def __post_init__(self) -> None:
        ranges = (
            (
                "temperature",
                0 <= self.temperature < math.inf,
                "divides the logits, so it is finite and not negative",
                1.0,
            ),
            ("top_k", self.top_k is None or self.top_k >= 1, "counts the tokens that are kept, at least 1", 50),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "is a probability, above 0 and at most 1", 0.9),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "is a share of the likeliest, from 0 to 1", 0.05),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "divides logits, so it is above 0", 1.1),
        )
        for name, good, rule, example in ranges:
            if not good:
                raise BlockError(name, getattr(self, name), rule, f"Write e.g. {name}={example}, or leave it out")


def sample(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen: Tensor | None = None,
) -> Tensor:
    """Sample a token for each row.

    Args:
        logits: [B,V]
        sampling: how
        generators: one per row, so that rows are independent of each other
        seen: [B,V] whether a token occurs in the row; needed for a repetition penalty

    Returns:
        [B]
    """
    if sampling.repetition_penalty != 1 and seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return draw(narrow(logits, sampling), sampling, generators)


def narrow(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B,V] whose softmax is sampled from, −∞ for every excluded token; unchanged at temperature 0."""
    return candidates(logits / sampling.temperature, sampling) if sampling.temperature else logits


def draw(narrowed: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """A token of each row of ``narrow``, [B]; the likeliest at temperature 0."""
    if sampling.temperature == 0:
        return narrowed.argmax(-1)
    # What torch.multinomial computes for one draw of each row, without its checks, which take as long.
    waits = torch.empty_like(narrowed)
    for row, generator in zip(waits, generators, strict=True):
        row.exponential_(generator=generator)
    probabilities = narrowed.softmax(-1)
    if not probabilities.sum().isfinite():
        raise RuntimeError("no token can be drawn from logits that are not finite: the model has diverged")
    return (probabilities / waits).argmax(-1)


def candidates(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B,V] with −∞ for every excluded token; the likeliest is never excluded."""
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        enough = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # the tokens before it suffice
        logits = logits.masked_fill(enough.scatter(-1, order, enough), -math.inf)
    if sampling.min_p is not None:
        least = logits.amax(-1, keepdim=True) + math.log(max(sampling.min_p, 1e-300))
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits
