"""The contract of ``dropping``: take tokens back from overloaded experts, in training. A child of ``ffn/moe``."""

from __future__ import annotations

from blocks.base import Block
from blocks.gating.base import Routing
from registry import family


@family("dropping", context=("n_experts",))
class Dropping(Block):
    """Turns a routing into one in which some entries are E, no expert, with weight 0."""

    def forward(self, routing: Routing, shape: tuple[int, int]) -> Routing:
        """A routing of ``shape`` (B, T) tokens → one with fewer pairs; in evaluation the same one."""
        raise NotImplementedError
