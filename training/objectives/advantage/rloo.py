from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.advantage.base import Advantage, centred


@register("advantage", "rloo")
class RLOO(Advantage):
    """Reward less the mean of the group's other rewards.

    Ahmadian et al. 2024 (REINFORCE leave-one-out), arXiv 2402.14740: A_i = r_i − mean of r_j, j ≠ i, which is n / (n −
    1) times the reward less the mean of all n. A group with one reward has advantage 0.
    """

    def __init__(self) -> None: ...

    def of(self, rewards: Tensor) -> Tensor:
        number = (~rewards.isnan()).sum(1, keepdim=True)
        return centred(rewards) * number / (number - 1).clamp(min=1)
