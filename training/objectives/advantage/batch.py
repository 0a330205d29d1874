from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.advantage.base import EPSILON, Advantage, centred, deviation


@register("advantage", "batch")
class Batch(Advantage):
    """Reward less the group's mean, divided by the standard deviation of all rewards of the rollout.

    TRL's ``scale_rewards=batch``: A_i = (r_i − mean of its group) / (std of all + 1e-4), the sample's deviation.
    """

    def __init__(self) -> None: ...

    def of(self, rewards: Tensor) -> Tensor:
        return centred(rewards) / (deviation(rewards, (0, 1)) + EPSILON)
