from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.advantage.base import EPSILON, Advantage, centred, deviation


@register("advantage", "group")
class Group(Advantage):
    """Reward less the group's mean, divided by the group's standard deviation.

    Shao et al. 2024 (DeepSeekMath, GRPO), arXiv 2402.03300: A_i = (r_i − mean r) / std r. The deviation is the sample's
    (n − 1) plus 1e-4, as in TRL. A group whose rewards are all equal has advantage 0.
    """

    def __init__(self) -> None: ...

    def of(self, rewards: Tensor) -> Tensor:
        return centred(rewards) / (deviation(rewards, 1) + EPSILON)
