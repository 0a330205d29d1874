from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("norm", "divided")
class Divided(Norm):
    """Another norm, whose result is divided by a number: as the model's last norm it sets how large logits are.

    Yang et al. 2022 (µP), arXiv 2203.03466, whose output multiplier is 1/width; Inkling divides by 24. Norms look for
    their kind outward: where the model's is this one, others are named (``residual.attention_norm``, …).

    Args:
        norm: the other norm; ``rmsnorm`` if none is named
        by: the divisor
    """

    default_children: ClassVar[Mapping[str, Any]] = {"norm": {"name": "rmsnorm"}}

    def __init__(self, norm: Norm, by: Positive = 1.0) -> None:
        super().__init__()
        self.norm, self.by = norm, by

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) / self.by
