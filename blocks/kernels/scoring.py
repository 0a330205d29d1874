"""How attention scores are computed between q·k and the softmax, in addition to the causal mask."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

EVERY = slice(None)


class Formula(Protocol):
    """A bias that is not yet computed: at [B,N,T,S] numbers it would be far larger than what it is computed from."""

    @property
    def learns(self) -> bool:
        """Whether what it is computed from needs a gradient."""

    def dense(self) -> Tensor:
        """The bias, [B|1,N|1,T,S]."""

    def part(self, sequences: slice, heads: slice, queries: slice, keys: slice) -> Formula:
        """That of some sequences, heads, queries and keys; one that all sequences share stays so."""

    def added(self, rows: int) -> Callable[..., Tensor]:
        """For FlexAttention: (b, h, t, s) → what is added to that score, of so many sequences. It closes over tensors
        alone, each of which it reads once: torch computes no gradient of one that is read twice."""


class Slopes(NamedTuple):
    """A bias that falls with distance, −slope · max(0, query's position − key's position).

    slopes: [N] fp32, one per head
    queries: [B|1,T] positions
    keys: [B|1,S] positions
    """

    slopes: Tensor
    queries: Tensor
    keys: Tensor

    @property
    def learns(self) -> bool:
        return self.slopes.requires_grad

    def dense(self) -> Tensor:
        distance = (self.queries[:, :, None] - self.keys[:, None, :]).clamp(min=0).float()
        return -self.slopes[:, None, None] * distance[:, None]

    def part(self, sequences: slice, heads: slice, queries: slice, keys: slice) -> Slopes:
        return Slopes(
            self.slopes[heads], _shared(self.queries, sequences)[:, queries], _shared(self.keys, sequences)[:, keys]
        )

    def added(self, rows: int) -> Callable[..., Tensor]:
        slopes, queries, keys = self.slopes, *_of_any_length(rows, self.queries, self.keys)
        return lambda b, h, t, s: -slopes[h] * (queries[b, t] - keys[b, s]).clamp(min=0).float()


class Band(NamedTuple):
    """A bias that each query has for each of the last E distances, and that is 0 beyond.

    profiles: [B,T,N,E], that at distance 0, 1, …, E − 1 before the query
    queries: [B|1,T] positions
    keys: [B|1,S] positions
    """

    profiles: Tensor
    queries: Tensor
    keys: Tensor

    @property
    def learns(self) -> bool:
        return self.profiles.requires_grad

    def dense(self) -> Tensor:
        (B, T, N, E), S = self.profiles.shape, self.keys.shape[1]
        distance = (self.queries[:, :, None] - self.keys[:, None, :])[:, None]
        near = distance.clamp(0, E - 1).expand(B, N, T, S)
        return self.profiles.transpose(1, 2).gather(-1, near).masked_fill((distance < 0) | (distance >= E), 0)

    def part(self, sequences: slice, heads: slice, queries: slice, keys: slice) -> Band:
        profiles = _shared(self.profiles, sequences)[:, queries, heads]
        return Band(profiles, _shared(self.queries, sequences)[:, queries], _shared(self.keys, sequences)[:, keys])

    def added(self, rows: int) -> Callable[..., Tensor]:
        profiles, queries, keys = _of_any_length(rows, *self)
        E = self.profiles.shape[-1]

        def of_distance(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            distance = queries[b, t] - keys[b, s]
            bias = profiles[b, t, h, distance.clamp(0, E - 1)]
            return torch.where((distance >= 0) & (distance < E), bias, torch.zeros_like(bias))

        return of_distance


Bias: TypeAlias = Tensor | Formula | None


def dense(bias: Bias) -> Tensor | None:
    """A bias as a tensor, [B|1,N|1,T,S], for implementations that add one."""
    return bias if bias is None or isinstance(bias, Tensor) else bias.dense()


def part(bias: Bias, sequences: slice, heads: slice, queries: slice, keys: slice) -> Tensor | None:
    """The bias of some sequences, heads, queries and keys, as a tensor."""
    if bias is None or not isinstance(bias, Tensor):
        return None if bias is None else bias.part(sequences, heads, queries, keys).dense()
    return _shared(bias, sequences)[:, heads if bias.shape[1] > 1 else EVERY, queries, keys]


def of_heads(bias: Tensor | Formula, heads: slice) -> Tensor | Formula:
    """The part of a bias that belongs to some of the heads."""
    if not isinstance(bias, Tensor):
        return bias.part(EVERY, heads, EVERY, EVERY)
    return bias if bias.shape[1] == 1 else bias[:, heads]


def times(bias: Bias, factors: Tensor) -> Bias:
    """A bias whose rows are multiplied by factors of the queries, [B|1,T]."""
    if isinstance(bias, Band):
        return bias._replace(profiles=_rounded_once(bias.profiles, factors[..., None, None]))
    made = dense(bias)
    return None if made is None else _rounded_once(made, factors[:, None, :, None])


def _rounded_once(t: Tensor, factors: Tensor) -> Tensor:
    wide = torch.promote_types(t.dtype, torch.float32)
    return (t.to(wide) * factors.to(wide)).to(t.dtype)


def of_any_length(t: Tensor, *dimensions: int) -> Tensor:
    """Let the compiler take these for variable from the first: it would find out one by one, with a graph for each."""
    if not torch.compiler.is_compiling():
        dynamo: Any = torch._dynamo
        dynamo.maybe_mark_dynamic(t, dimensions)
    return t


def _of_any_length(rows: int, *tensors: Tensor) -> list[Tensor]:
    """[B|1,T,…] each, for that many rows."""
    return [of_any_length(t.expand(rows, *t.shape[1:]), 1) for t in tensors]


def _shared(t: Tensor, sequences: slice) -> Tensor:
    return t if len(t) == 1 else t[sequences]


class Scoring(NamedTuple):
    """Computation of the scores of the last T of S positions on all previous ones.

    scale: multiplies q·k
    bias: [B|1,N|1,T,S] added to the scaled scores, or the formula to compute it by
    segments: [B,S] document ids of the keys, the last T those of the queries, a document in one run; tokens of
        different documents never see each other
    window: number of last tokens a token sees, itself included; None for all
    sinks: [N] scores of a key without a value, one per head
    softcap: bound of the scaled scores, by a tanh, before the bias
    """

    scale: float
    bias: Bias = None
    segments: Tensor | None = None
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the scale."""
        return all(part is None for part in self[1:])

    @property
    def learns_bias(self) -> bool:
        """Whether the bias needs a gradient, which few implementations compute."""
        if self.bias is None:
            return False
        return self.bias.requires_grad if isinstance(self.bias, Tensor) else self.bias.learns


# --- what attention needs to know of packed documents, made once a batch and found again by every layer ---


V = TypeVar("V")

PADDING = -1  # the document of padding: it is in no loss, no load and no figure

_made = WeakTensorKeyDictionary()  # segments → what was made of them; both go with the batch


def once(segments: Tensor, key: Hashable, make: Callable[[Tensor], V]) -> V:
    """``make`` of these segments, the first time; then what it made.

    It is given an alias: what refers to ``segments`` itself would never let it go. A compiler makes it in each graph.
    """
    if torch.compiler.is_compiling():
        return make(segments)
    known = _made.setdefault(segments, {})
    if key not in known:
        known[key] = make(segments.data)
    return known[key]


def is_real(segments: Tensor) -> Tensor:
    """Document ids [B,T] → which tokens are not padding, [B,T] booleans."""
    return segments != PADDING


def starts(segments: Tensor) -> Tensor:
    """Document ids [B,T] → where the document of each token begins in its row, [B,T]."""
    index = torch.arange(segments.shape[1], device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, index, 0).cummax(1).values


def borders(segments: Tensor) -> Tensor:
    """Where each document begins among the B·T tokens, and B·T, int32. The host waits for their number."""
    begins = starts(segments) == torch.arange(segments.shape[1], device=segments.device)
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
