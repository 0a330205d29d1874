"""The contract of ``selector``: choose which keys each query of an attention sees. A child of attention.

A selector is asked after the attention has its keys. Causality, documents and padding are settled before: it chooses
among the keys that a query may see, and the attention's result is that over the chosen ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.base import Drawn, Remembering
from blockwright.registry import family


class Asked(NamedTuple):
    """The T tokens that choose.

    x: [B,T,D], the attention's input
    latent: [B,T,L], its compressed queries; x where it does not compress them
    q: [B,T,N,H], its queries, rotated
    positions: [B|1,T]
    declared: tokens that the sequences are declared to have, for ``Position.rotate_in``
    rotate: as the attention rotates heads [B,T,·,W] at positions [B|1,T], where it chooses among means of tokens
    real: [B,T], which of them are tokens and not padding; None for all
    """

    x: Tensor
    latent: Tensor
    q: Tensor
    positions: Tensor
    declared: int | Tensor
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    real: Tensor | None = None

    def rows(self, rows: slice) -> Asked:
        """Some of the tokens."""
        positions = self.positions[:, rows]
        x, latent, q = (t[:, rows] for t in self[:3])
        real = None if self.real is None else self.real[:, rows]
        return self._replace(x=x, latent=latent, q=q, positions=positions, real=real)


class Held(NamedTuple):
    """The S keys to choose from, the last T of them those of the tokens that choose.

    stored: [B,S,…], what the attention stores of each token, rotated
    expand: some or averages of them, [B,n,…] → keys [B,n,K,H]; linear
    slots: [B,S,…] for each of the selector's own slots
    positions: [B|1,S]
    places: [B|1,S], how many tokens of its document come before each; negative for padding
    seen: [B|1,T,S], whether a query may see a key
    segments: whether rows may have several documents
    before: [B,N|1,T,S], what the nearest layer below chose; None for all, or where there is none
    """

    stored: Tensor
    expand: Callable[[Tensor], Tensor]
    slots: tuple[Tensor, ...]
    positions: Tensor
    places: Tensor
    seen: Tensor
    segments: bool
    before: Tensor | None = None


@family("selector", context=("latent_dim", "attention_heads"))
class Selector(Remembering):
    """Chooses keys. Context: ``latent_dim`` (L of ``Asked``) and ``attention_heads`` (N, of all ranks).

    Equal scores go to the later token, so that a choice does not depend on how many keys there are; blocks are counted
    in the document, so that it does not depend on what is before it in its row.

    Attributes, of a class or of a block:
        learns: whether it has losses, and so parameters that nothing else trains
        reuses: whether it needs the choice of a layer below
        per_head: whether it chooses for each query head
    """

    learns: bool = False
    reuses: bool = False
    per_head: bool = False

    def drawn(self) -> Drawn:
        return Drawn(acts="keys seen")

    def takes_all(self, n_keys: int) -> bool:
        """Whether all queries see all of so many keys: the attention is then computed as without a selector."""
        raise NotImplementedError

    def forward(self, asked: Asked, held: Held) -> Tensor | None:
        """Which keys each query sees, [B,N|1,T,S] booleans, within ``held.seen``; None for all of them. Every query
        sees at least one."""
        raise NotImplementedError

    def losses(
        self, asked: Asked, held: Held, chosen: Tensor | None, scale: float, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses by which it learns, name → scalar, already weighted; none by default. Each is a mean over the queries
        that are ``asked.real``.

        Args:
            asked, held: as for the choice
            chosen: what ``forward`` returned; None: all that is seen
            scale, bias: of the attention's scores, as in blocks/kernels/scoring.py; bias [B|1,N|1,T,S]
        """
        return {}


def how_many(true: Tensor) -> Tensor:
    """How many of booleans [...,S] are true; several times as fast as their ``sum`` on a CPU."""
    if not true.is_cpu or torch.compiler.is_compiling():  # Triton casts no boolean's bits
        return true.sum(-1, dtype=torch.int32)
    return true.view(torch.uint8).sum(-1, dtype=torch.int32)


def highest(scores: Tensor, k: int) -> Tensor:
    """The k highest of scores [...,S] as booleans; of equal ones the last. All, where there are no more than k.

    A score of −∞ may be among them. The k-th highest value does not depend on which of several equal scores a sort
    puts first, so neither does this.
    """
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    least = scores.topk(k, -1, sorted=False).values.amin(-1, keepdim=True)
    if not scores.is_cpu or torch.compiler.is_compiling() or type(scores) is not Tensor:  # a tracer's has no values
        return _last_of_equal(scores, least, k)
    chosen = scores >= least
    tied = how_many(chosen) != k  # few rows, nearly always
    if bool(tied.any()):
        chosen[tied] = _last_of_equal(scores[tied], least[tied], k)
    return chosen


def _last_of_equal(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """The k scores [...,S] of at least so much [...,1], the last ones of those that are equal to it."""
    above, equal = scores > least, scores == least
    missing = k - how_many(above)[..., None]
    last = equal.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= missing
    return above | (equal & last)


# --- blocks of adjacent tokens, counted in each document ---


class Blocks(NamedTuple):
    """Blocks of ``size`` tokens of each document; its last may be shorter. Padding is in none, and has number 0 or −1.

    size: tokens of a block
    number: [B|1,S], the block of each token, counted over the row
    first: [B|1,n], the index of each block's first token
    last: whether a token is the last of a whole block, [B|1,S]
    opening: [B|1,S], the number of the first block of the token's document
    """

    size: int
    number: Tensor
    first: Tensor
    last: Tensor
    opening: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Means of values [B,S,…] over each block, [B,n,…] in fp32 or more; of a short block those of whatever
        follows, which no query asks for."""
        return self.members(values.to(torch.promote_types(values.dtype, torch.float32))).mean(2)

    def members(self, values: Tensor) -> Tensor:
        """Values [B,S,…] of the tokens of each block, [B,n,size,…]; of a short block also of whatever follows."""
        B, S = values.shape[:2]
        members = self.first[..., None] + torch.arange(self.size, device=values.device)
        members = members.clamp(max=S - 1).flatten(1).expand(B, -1)
        index = members.reshape(*members.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, index).unflatten(1, (-1, self.size))

    def complete(self, n_queries: int, own: bool) -> Tensor:
        """[B|1,T,n]: the whole blocks of a query's document that end before it, for the last T tokens.

        Args:
            own: whether the query's own block is one of them where the query is its last token
        """
        number, opening, last = (t[:, -n_queries:, None] for t in (self.number, self.opening, self.last))
        blocks = torch.arange(self.first.shape[1], device=number.device)
        end = number + last.long() if own else number
        return (opening <= blocks) & (blocks < end)

    def total(self, weights: Tensor) -> Tensor:
        """Sums of weights of tokens [B,t,S] over each block, [B,t,n]."""
        index = self.number.clamp(min=0)[:, None].expand(*weights.shape)
        return weights.new_zeros(*weights.shape[:2], self.first.shape[1]).scatter_add(-1, index, weights)

    def spread(self, of_blocks: Tensor) -> Tensor:
        """What is true of blocks, [B,M,T,n] booleans, for their tokens, [B,M,T,S]."""
        index = self.number.clamp(min=0)[:, None, None].expand(*of_blocks.shape[:3], -1)
        return of_blocks.gather(-1, index)

    def own(self, n_queries: int) -> Tensor:
        """[B|1,T,S]: whether a key is in the block of a query, for the last T tokens."""
        return self.number[:, -n_queries:, None] == self.number[:, None]


def blocks_of(held: Held, size: int) -> Blocks:
    """The blocks of the documents of some keys."""
    places = held.places
    S = places.shape[1]
    starts = (places >= 0) & (places % size == 0)
    number = starts.long().cumsum(1) - 1
    # Several documents may have a block for each token; how many they have is asked of the device, but not of a graph
    # and not of tensors without values, meta or a tracer's.
    unknown = torch.compiler.is_compiling() or number.is_meta or type(number) is not Tensor
    most = -(-S // size) if not held.segments else S if unknown else int(number[:, -1].max()) + 1
    each = torch.arange(most, device=places.device).repeat(len(number), 1)
    first = torch.searchsorted(number.contiguous(), each)
    opening = number.gather(1, (torch.arange(S, device=places.device) - places).clamp(0, S - 1))
    last = (places >= 0) & (places % size == size - 1)
    return Blocks(size, number, first.clamp(max=S - 1), last, opening)
