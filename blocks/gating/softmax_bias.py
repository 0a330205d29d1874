from __future__ import annotations

from torch import Tensor

from blockwright.blocks.gating.sigmoid_bias import SigmoidBias
from blockwright.registry import register


@register("gating", "softmax_bias")
class SoftmaxBias(SigmoidBias):
    """``sigmoid_bias`` with softmax(W x) in place of the sigmoid: affinities that compete.

    LongCat-Flash, arXiv 2509.01322, which does not divide the chosen weights by their sum: choice, groups and the bias
    that balances are as in ``sigmoid_bias``.
    """

    def affinity(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)
