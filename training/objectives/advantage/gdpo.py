from __future__ import annotations

import torch
from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.advantage.base import EPSILON, Advantage, centred, deviation, total


@register("advantage", "gdpo")
class GDPO(Advantage):
    """Every reward function normalised within the group, then their weighted sum over the batch.

    GDPO, TRL's ``multi_objective_aggregation=normalize_then_sum``: a function with small rewards counts as much as its
    weight says, where the sum of rewards would hide it. Both deviations are the sample's, plus 1e-4.
    """

    def __init__(self) -> None: ...

    def __call__(self, rewards: Tensor, weights: Tensor) -> Tensor:
        each = torch.stack([centred(r) / (deviation(r, 1) + EPSILON) for r in rewards.unbind(-1)], -1)
        return self.of(total(each, weights)).nan_to_num(0.0)

    def of(self, rewards: Tensor) -> Tensor:
        return (rewards - rewards.nanmean()) / (deviation(rewards, (0, 1)) + EPSILON)
