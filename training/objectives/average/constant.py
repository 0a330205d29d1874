from __future__ import annotations

import torch
from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.average.base import Average


@register("average", "constant")
class Constant(Average):
    """The sum over tokens, divided by the rows times the longest completion allowed.

    Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783: Σ_i Σ_t loss / (rows · max_new_tokens). A token's weight depends
    neither on the length of its completion nor on those of others.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()

    def count(self, mask: Tensor) -> Tensor:
        return torch.tensor(len(mask) * self.max_new_tokens, device=mask.device, dtype=torch.int64)
