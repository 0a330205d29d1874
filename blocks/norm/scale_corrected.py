from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm.rmsnorm import RMSNorm
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("norm", "scale_corrected")
class ScaleCorrected(RMSNorm):
    """A root-mean-square norm of a latent, as long as that of the model's width.

    LongCat-Flash, arXiv 2509.01322 (scale-correction factors): y = √(d_model / dim) · x / sqrt(mean(x²) + eps) · g.
    What is made of a latent then has the variance that it would have if it were made of the model's states, whatever
    the latent's width. Of width d_model it is ``rmsnorm``.

    Args:
        eps: added to the mean square
    """

    def __init__(self, d_model: int, dim: int, eps: Positive = 1e-6) -> None:
        super().__init__(dim, eps)
        self.factor = (d_model / dim) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor
