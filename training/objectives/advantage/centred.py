from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.advantage.base import Advantage, centred


@register("advantage", "centred")
class Centred(Advantage):
    """Reward less the group's mean.

    Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783, and DeepSeek-V3.2, arXiv 2512.02556: A_i = r_i − mean r. Dividing by
    the deviation gives prompts that are almost always or almost never solved a larger weight; this does not.
    """

    def __init__(self) -> None: ...

    def of(self, rewards: Tensor) -> Tensor:
        return centred(rewards)
