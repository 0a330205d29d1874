"""What expert parallelism sends: tokens to the ranks that hold their experts, and their sums back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup


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
