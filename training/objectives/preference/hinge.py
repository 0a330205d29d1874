from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.preference.base import Answers, PreferenceLoss


@register("preference", "hinge")
class Hinge(PreferenceLoss):
    """max(0, 1 − β Δ) of DPO's Δ.

    Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, in DPO's form, as TRL has it: pairs that are separated by 1/β nats
    teach nothing.
    """

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return (1 - self.margin(chosen, rejected)).clamp(min=0)
