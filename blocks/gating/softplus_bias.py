from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.gating.sigmoid_bias import SigmoidBias
from blockwright.registry import register


@register("gating", "softplus_bias")
class SoftplusBias(SigmoidBias):
    """``sigmoid_bias`` with √softplus(W x) in place of the sigmoid: affinities without an upper bound.

    DeepSeek-V4: choice, groups, renormalised weights and the bias that balances are as in ``sigmoid_bias``.
    """

    def affinity(self, logits: Tensor) -> Tensor:
        return F.softplus(logits).sqrt()
