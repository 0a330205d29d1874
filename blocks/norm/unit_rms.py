from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("norm", "unit_rms")
class UnitRMS(Norm):
    """Root-mean-square norm without a gain: y = x / sqrt(mean(x²) + eps).

    DeepSeek-V4's queries; nanochat's every norm. In low precision the mean is taken in fp32.

    Args:
        eps: added to the mean square
    """

    def __init__(self, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps)
