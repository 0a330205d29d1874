from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.penalty.base import Penalty, k3


@register("penalty", "k3")
class K3(Penalty):
    """π_ref/π − log(π_ref/π) − 1, the estimate of GRPO and DeepSeek-V2 (arXiv 2405.04434, eq. 33).

    Unbiased as a value and never negative. As a loss its expected gradient on policy is that of KL(reference ‖ π).

    Args:
        beta: weight of the estimate
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        return k3(logp, reference)
