from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.penalty.base import Penalty


@register("penalty", "k2")
class K2(Penalty):
    """½ (log π − log reference)²: biased as a value; on policy its expected gradient is that of KL(π ‖ reference).

    Schulman 2020, "Approximating KL divergence".

    Args:
        beta: weight of the estimate
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        return (logp - reference).square() / 2
