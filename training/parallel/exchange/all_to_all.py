"""What expert parallelism sends, and torch's all-to-all, which sends it on any device.

Tokens go to the ranks that hold their experts, and their sums come back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from blockwright.blocks.kernels.grouped_matmul import add_up, take
from blockwright.training.parallel.collectives import exchange, exchange_counts


class Received(NamedTuple):
    """The tokens that came to this rank.

    rows: [R,D] token states
    experts: [R,k] int64, this rank's experts that each is for, from 0; ``held`` for none
    weights: [R,k] fp32, factors on these experts' outputs
    pairs: how many entries of ``experts`` are below ``held``, at most
    handle: what ``give_back`` needs to know
    """

    rows: Tensor
    experts: Tensor
    weights: Tensor
    pairs: int
    handle: Any


class Exchange(ABC):
    """A way of sending. Gradients of states and weights pass both ways.

    Args:
        group: the ranks
        ranks: their number, n
        held: experts of each
    """

    def __init__(self, group: ProcessGroup, ranks: int, held: int) -> None:
        self.group, self.ranks, self.held = group, ranks, held

    @abstractmethod
    def send(self, x: Tensor, rank: Tensor, number: Tensor, weights: Tensor) -> Received:
        """Send each token once to each rank that holds any of its experts.

        Args:
            x: [T,D]
            rank: [T,k] of the rank that holds each expert of a token; n for no expert
            number: [T,k] of the expert on that rank, from 0
            weights: [T,k] fp32
        """

    @abstractmethod
    def give_back(self, answers: Tensor, handle: Any) -> Tensor:
        """Rows [R,D] that belong to the received ones → for each token the sum of its rows, [T,D]."""


class Handle(NamedTuple):
    """Rows sent to each rank and received from each; the token of each row sent; the tokens."""

    sent: list[int]
    received: list[int]
    token: Tensor
    x: Tensor


class AllToAll(Exchange):
    """Two exchanges of exactly as many rows as are needed.

    The host waits for the device once, for the counts of rows sent and received.
    """

    def send(self, x: Tensor, rank: Tensor, number: Tensor, weights: Tensor) -> Received:
        n = self.ranks
        reached = torch.zeros(len(x), n + 1, dtype=torch.bool, device=x.device).scatter_(1, rank, True)[:, :n]
        asked_of = torch.zeros(n + 1, dtype=torch.int64, device=x.device)
        asked_of.scatter_add_(0, rank.flatten(), torch.ones_like(rank).flatten())
        counts = torch.stack((reached.sum(0), asked_of[:n]), 1)
        sent, received, pairs = torch.cat((counts[:, :1], exchange_counts(counts, self.group)), 1).t().tolist()
        rows = (~reached.t()).flatten().to(torch.uint8).argsort(stable=True)[: sum(sent)]  # by rank, then by token
        to, token = rows // len(x), rows % len(x)
        absent = rank[token] != to[:, None]
        numbers, order = number[token].masked_fill(absent, self.held).sort(1)
        shares = take(weights, token).gather(1, order).masked_fill(numbers == self.held, 0)
        width = min(numbers.shape[1], self.held)  # a row has at most as many experts as the rank holds
        note = torch.cat((numbers[:, :width].float(), shares[:, :width].float()), 1)
        rows, note = exchange(received, sent, self.group, take(x, token), note)
        asked, share = note.chunk(2, 1)
        return Received(rows, asked.detach().round().long(), share, sum(pairs), Handle(sent, received, token, x))

    def give_back(self, answers: Tensor, handle: Handle) -> Tensor:
        (back,) = exchange(handle.sent, handle.received, self.group, answers)
        return add_up(back.to(handle.x.dtype), handle.token, len(handle.x))
