"""The contract of ``norm``: bring activations to a common scale."""

from __future__ import annotations

import math

from torch import Tensor

from blocks.base import Block
from registry import BlockError, family


@family("norm", context=("dim",))
class Norm(Block):
    """Normalises the last dimension. ``dim``, its width, is supplied by whoever owns the norm."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] → [..., dim], same dtype."""
        raise NotImplementedError


def above_zero(eps: float) -> float:
    """An eps that keeps the root real and the quotient finite.

    Raises:
        BlockError
    """
    if not 0 < eps < math.inf:
        raise BlockError("eps", eps, "is added under a root, so it is finite and above 0", "Write 1e-5 or 1e-6")
    return eps
