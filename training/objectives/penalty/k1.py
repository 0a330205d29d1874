from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.penalty.base import Penalty


@register("penalty", "k1")
class K1(Penalty):
    """log π − log reference: unbiased as a value, but on policy its expected gradient is 0, so it holds nothing back.

    Schulman 2020, "Approximating KL divergence". Useful as a figure and for comparison.

    Args:
        beta: weight of the estimate
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        return logp - reference
