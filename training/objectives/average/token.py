from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.average.base import Average


@register("average", "token")
class Token(Average):
    """The mean over all tokens of the step.

    Yu et al. 2025 (DAPO), arXiv 2503.14476: Σ_i Σ_t loss / Σ_i |o_i|. Long completions weigh more than short ones.
    """

    def __init__(self) -> None: ...

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()

    def count(self, mask: Tensor) -> Tensor:
        return mask.sum().long()
