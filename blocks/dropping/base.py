"""The contract of ``dropping``: drop tokens of overloaded experts, in training. A child of ``ffn/moe``."""

from __future__ import annotations

from typing import ClassVar

from blockwright.blocks.base import Block
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.gating.base import Routing
from blockwright.registry import family


@family("dropping", context=("n_experts",))
class Dropping(Block):
    """Replaces entries of a routing by E, no expert, with weight 0."""

    # How many are dropped depends on the routing, and what is dropped is not computed.
    flops_within: ClassVar[float | None] = 0.1

    def drawn(self) -> Drawn:
        return Drawn(acts="training")

    def forward(self, routing: Routing, shape: tuple[int, int]) -> Routing:
        """A routing of ``shape`` (B, T) tokens → one with fewer pairs; unchanged in evaluation."""
        raise NotImplementedError
