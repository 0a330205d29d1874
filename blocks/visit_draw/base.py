"""The contract of ``visit_draw``: how many visits of a loop a training step makes. A child of ``loop``."""

from __future__ import annotations

import numpy as np

from blockwright.blocks.base import Block
from blockwright.registry import family

MOST = 1024  # visits; more would take days, and a file of unknown origin may ask for any number


@family("visit_draw", context=("visits",), in_layers=False)
class VisitDraw(Block):
    """Draws a number of visits for each step. Context: ``visits``, r outside of training.

    All ranks draw the same, and a resumed run draws what the whole run drew: the seed is that of the run and the step.
    """

    def visits_of(self, seed: int) -> int:
        """The visits of a step, from 1 to ``MOST``."""
        return min(max(self.draw(np.random.default_rng(seed)), 1), MOST)

    def draw(self, generator: np.random.Generator) -> int:
        """A number of visits; what is beyond the bounds is cut off. It is drawn by NumPy, on no device of torch."""
        raise NotImplementedError
