"""Blocks of adjacent tokens, counted in each document."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.selector.base import Held


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
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        B, S = values.shape[:2]
        members = self.first[..., None] + torch.arange(self.size, device=values.device)
        members = members.clamp(max=S - 1).flatten(1).expand(B, -1)
        index = members.reshape(*members.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return wide.gather(1, index).unflatten(1, (-1, self.size)).mean(2)

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
