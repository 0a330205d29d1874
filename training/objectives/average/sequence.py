from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import register
from blockwright.training.objectives.average.base import Average


@register("average", "sequence")
class Sequence(Average):
    """The mean over completions of the means over their tokens.

    Shao et al. 2024 (GRPO), arXiv 2402.03300: 1/rows Σ_i 1/|o_i| Σ_t loss. A token of a long completion weighs less. A
    completion without scored tokens counts as a row, as in TRL.
    """

    def __init__(self) -> None: ...

    def weights(self, mask: Tensor) -> Tensor:
        return at_least_fp32(mask) / mask.sum(1, keepdim=True).clamp(min=1)

    def count(self, mask: Tensor) -> Tensor:
        return torch.tensor(len(mask), device=mask.device, dtype=torch.int64)
