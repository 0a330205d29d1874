"""How a token is drawn from logits."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from blockwright.registry import BlockError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count, Fraction, Share


@dataclass
class Acceptance:
    """Counts of a generation.

    Attributes:
        passes: of the model over a row, each of which gives a token, and the drafts after it that it accepts
        drafted: tokens that were drafted
        accepted: drafts that were the tokens drawn
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, kept: Sequence[int], drafted: Sequence[int]) -> None:
        """A pass over rows, each with the number of tokens that it gave, and of drafts that it checked."""
        self.passes += len(kept)
        self.drafted += sum(drafted)
        self.accepted += sum(kept) - len(kept)

    @property
    def share(self) -> float:
        """Of the drafts, those accepted; 0 where there are none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_a_pass(self) -> float:
        """Tokens of a row for each pass over it; 1 without drafts."""
        return 1 + self.accepted / self.passes if self.passes else 1.0


# --- draws of a row, one after the other ------------------------------------------------------------------------------


class Draws:
    """The draws of a row.

    Args:
        sampling: sampling parameters
        generator: of the row alone
        seen: [V] whether a token occurs in the row, kept up to date; None where nothing depends on it
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator, seen: Tensor | None) -> None:
        self.sampling, self.generator, self.seen = sampling, generator, seen

    @classmethod
    def of(cls, sampling: Sampling, seed: int, text: Collection[int], vocabulary: int, device: torch.device) -> Draws:
        """The draws that continue a text."""
        seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            seen[list(text)] = True
        return cls(sampling, torch.Generator(device).manual_seed(seed), seen)

    def copy(self) -> Draws:
        """The same draws once more, which leave these as they are.

        A token is argmax p_i / e_i, with exponentials e from the generator alone (``sample.draw``). So the copy draws
        the same token from the same logits, and mostly from similar ones: Gumbel coupling (Daliri et al. 2024, arXiv
        2408.07978), by which two distributions at total variation t agree with a probability of at least
        (1 − t) / (1 + t).
        """
        return Draws(self.sampling, self.generator.clone_state(), None if self.seen is None else self.seen.clone())


def draw_each(draws: Sequence[Draws], logits: Tensor) -> list[int]:
    """A token of each row from logits [B,V]: together for rows of equal sampling."""
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(draws):
        groups.setdefault(row.sampling, []).append(i)
    tokens = [0] * len(draws)
    for sampling, members in groups.items():
        some = logits if len(groups) == 1 else logits[members]
        seen = [own for i in members if (own := draws[i].seen) is not None]
        drawn = sample(some, sampling, [draws[i].generator for i in members], torch.stack(seen) if seen else None)
        for i, token in zip(members, drawn.tolist(), strict=True):
            tokens[i] = token
    for row, token in zip(draws, tokens, strict=True):
        if row.seen is not None:
            row.seen[token] = True
    return tokens


# Beyond these, logits of fp32 become infinite, and numbers no floats.
Temperature = Annotated[float, Ge(0), Le(1e9)]
Penalty = Annotated[float, Ge(1e-9), Le(1e9)]
COLDEST = 1e-20  # divides no logit to infinity, and leaves the likeliest token alone


class NotFiniteError(RuntimeError):
    """No token can be drawn from logits: the model has diverged, or overflows its dtype."""

    def __init__(self) -> None:
        super().__init__("no token can be drawn from logits that are not finite: the model has diverged")


@enforced(BlockError)
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

    temperature: Temperature = 1.0
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Fraction | None = None
    repetition_penalty: Penalty = 1.0

    @property
    def narrows(self) -> bool:
        """Whether any token may be excluded."""
        return self.temperature > 0 and (self.top_k, self.top_p, self.min_p) != (None, None, None)


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

    Raises:
        NotFiniteError: a row of logits is not ``drawable``
    """
    if sampling.repetition_penalty != 1 and seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return draw(narrow(logits, sampling), sampling, generators)


def drawable(logits: Tensor) -> list[bool]:
    """Whether a token can be drawn from each row of logits [B,V]: the largest is finite, so none is NaN."""
    return logits.amax(-1).isfinite().tolist()


def narrow(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B,V] whose softmax is sampled from, −∞ for every excluded token; unchanged at temperature 0."""
    if sampling.temperature == 0:
        return logits
    return candidates(logits / max(sampling.temperature, COLDEST), sampling)


def draw(narrowed: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """A token of each row of ``narrow``, [B]; the likeliest at temperature 0."""
    if sampling.temperature == 0:
        evidence, tokens = narrowed.max(-1)
        return _sound(tokens, evidence)
    # What torch.multinomial computes for one draw of each row, without its checks, which take as long.
    waits = torch.empty_like(narrowed)
    for row, generator in zip(waits, generators, strict=True):
        row.exponential_(generator=generator)
    probabilities = narrowed.softmax(-1)
    tokens = (probabilities / waits).argmax(-1)
    return _sound(tokens, probabilities.gather(-1, tokens[:, None]))


def _sound(tokens: Tensor, evidence: Tensor) -> Tensor:
    """Tokens, whose logits or probabilities have to be finite: they are not where any of their row's is NaN."""
    if not evidence.isfinite().all():
        raise NotFiniteError
    return tokens


def candidates(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B,V] with −∞ for every excluded token; the likeliest is never excluded."""
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        enough = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # the tokens before it suffice
        enough[:, 0] = False  # also where top_p is 0 in fp32
        logits = logits.masked_fill(enough.scatter(-1, order, enough), -math.inf)
    if sampling.min_p is not None:
        least = logits.amax(-1, keepdim=True) + math.log(max(sampling.min_p, 1e-300))
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits
