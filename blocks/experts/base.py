"""The contract of ``experts``: feed-forward networks, each applied to the tokens routed to it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.gating.base import Routing
from blockwright.registry import family


@family("experts", context=("n_experts",))
class Experts(Block):
    """Weights are stacked (E, …), so a checkpoint has one tensor for all and expert parallelism splits dimension 0.

    Dropless: every token reaches every expert in its routing.
    """

    counted_as: ClassVar[str | None] = "routed_experts"

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [T,D] → Σ over a token's k experts of weight · expert(x), [T,D]."""
        raise NotImplementedError
