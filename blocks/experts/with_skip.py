from __future__ import annotations

from torch import Tensor

from blockwright.blocks.experts.with_identity import WithIdentity
from blockwright.registry import register


@register("experts", "with_skip")
class WithSkip(WithIdentity):
    """Experts of which the last few return nothing: ``with_identity`` without the input's part.

    ZAYA1, arXiv 2511.17127, has one such expert.
    """

    def passed(self, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return y
